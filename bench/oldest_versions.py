"""Run the tests with the oldest versions that pyproject.toml allows: every dependency at exactly its lower bound.

    .venv/bin/python bench/oldest_versions.py                        # a temporary environment, all tests
    .venv/bin/python bench/oldest_versions.py tests/models --folder /tmp/oldest

Creates an environment, installs `name==bound` for every `name>=bound` in pyproject.toml, and prints which tests fail.
An environment in a given folder stays there and is updated by the next run. PyPI's torch is a CUDA build, so an
environment takes about 7 GB of disk and some minutes. Tests of what a version lacks are skipped.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def oldest(requirements: Sequence[str]) -> list[str]:
    """Pin requirements to their lower bounds: `name>=bound` becomes `name==bound`.

    Raises:
        SystemExit: a requirement has another form.
    """
    for requirement in requirements:
        if requirement.count(">=") != 1 or any(sign in requirement for sign in ",<!~; "):
            raise SystemExit(f"pyproject.toml gives no lower bound for {requirement!r}; write it as name>=version.")
    return [requirement.replace(">=", "==") for requirement in requirements]


def build(folder: Path, pins: Sequence[str]) -> Path:
    """Create an environment, or update it, with the package, its test tools and the pinned versions.

    Returns:
        The environment's Python.
    """
    python = folder / "bin" / "python"
    if not python.is_file():
        venv.create(folder, with_pip=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    # Editable, for the package's metadata; the tests import neko_lean from this checkout either way.
    subprocess.run([*pip, "--editable", f"{ROOT}[test]", *pins], check=True)
    return python


def run_tests(python: Path, tests: Sequence[str], workers: int) -> int:
    """Run tests that need no GPU, and print those that fail. Returns pytest's exit code."""
    command = [python, "-m", "pytest", "-rfE", "--tb=short", "-m", "not cuda", "-p", "no:cacheprovider", *tests]
    if workers > 1:
        command += ["--numprocesses", str(workers), "--dist", "loadfile"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", help="files, folders or node ids; all tests without any")
    parser.add_argument("--folder", type=Path, help="where the environment is, or will be; temporary without it")
    parser.add_argument("--workers", type=int, default=2, help="processes that run tests")
    options = parser.parse_args()

    pins = oldest(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    print(f"Python {sys.version.split()[0]}, {', '.join(pins)}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        python = build((options.folder or Path(temporary) / "env").absolute(), pins)
        return run_tests(python, options.tests, options.workers)


if __name__ == "__main__":
    sys.exit(main())

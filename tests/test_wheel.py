"""The built wheel holds every file that the package needs, and runs without the checkout."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built without the network from a copy of the sources, so that no build folder is left behind."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT / "neko_lean", source / "neko_lean", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)

    command = [*PIP, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", str(out), str(source)]
    subprocess.run(command, check=True)
    (built,) = out.glob("neko_lean-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder into which the wheel alone was installed; its dependencies come from this environment."""
    target = tmp_path_factory.mktemp("site")
    subprocess.run([*PIP, "install", "--no-index", "--no-deps", "--target", str(target), str(wheel)], check=True)
    return target


def python(installed: Path, folder: Path, *arguments: str) -> str:
    """Standard output of Python, run in `folder` (`-P`: which is not searched for modules) with the installed wheel."""
    env = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-P", *arguments]
    return subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(wheel):
    package = ROOT / "neko_lean"
    files = {str(path.relative_to(ROOT)) for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    packed = {*zipfile.ZipFile(wheel).namelist()}
    assert {"neko_lean/py.typed", "neko_lean/cache/FORMAT.md", "neko_lean/recipe/neko.toml"} <= files
    assert files <= packed
    assert any(name.endswith("licenses/LICENSE") for name in packed)


@pytest.mark.slow
def test_the_installed_wheel_runs_the_demo(installed, world, tmp_path):
    """On the small data set of the tests, from an empty folder, so that nothing of the checkout is imported."""
    home = python(installed, tmp_path, "-c", "import neko_lean; print(neko_lean.__file__)").strip()
    assert home == str(installed / "neko_lean" / "__init__.py")

    demo = ["demo", "--data", str(world), "--out", "out", "--max-steps", "1", "--json", "--quiet"]
    result = json.loads(python(installed, tmp_path, "-m", "neko_lean", *demo))
    assert set(result["scores"]) == {"before", "calibrated", "neko"}
    assert (tmp_path / "out" / "report.html").is_file()

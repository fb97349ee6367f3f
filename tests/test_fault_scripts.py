"""The scripts in shared/faults, if they are available, must pass. Their faults have tests in this suite as well."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).parents[2] / "shared" / "faults"
RUN = re.compile(r"\$ neko-lean (\S+) \.\.\. -> rc (\d+), traceback (\w+)")


def run(name: str, tmp_path: Path) -> str:
    """What a script prints. Scripts write into the temporary folder and run the commands of this checkout."""
    (found,) = [*FAULTS.glob(f"{name}_*.py")] or [None]
    if found is None:
        pytest.skip(f"no script {name} in {FAULTS}")
    env = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run([sys.executable, found], capture_output=True, text=True, env=env, check=False).stdout


def codes(said: str) -> list[tuple[str, int]]:
    """Each command and its exit code; no command may end in a traceback."""
    runs = RUN.findall(said)
    assert runs and not any(traceback == "True" for _, _, traceback in runs), said
    return [(command, int(code)) for command, code, _ in runs]


def all_cells(said: str) -> list[dict[str, float]]:
    return [ast.literal_eval(line) for line in re.findall(r"cells: (\{.*\})", said)]


def test_renamed_tensors(tmp_path):
    assert codes(run("01", tmp_path))[:2] == [("score", 0), ("score", 2)]  # the script stops where no score is written


def test_end_tokens(tmp_path):
    (cells,) = all_cells(said := run("02", tmp_path))
    assert codes(said) == [("score", 0)] and set(cells.values()) == {1.0}


def test_a_tokenizer_that_appends_eos(tmp_path):
    plain, appending = all_cells(said := run("03", tmp_path))
    assert codes(said) == [("score", 0)] * 2 and plain == appending and set(plain.values()) == {1.0}


@pytest.mark.parametrize("name", ["05", "06", "13"])
def test_families_are_supported(name, tmp_path):
    assert {code for _, code in codes(run(name, tmp_path))} == {0}


@pytest.mark.parametrize("name", ["08", "09"])
def test_damaged_files_are_refused(name, tmp_path):
    assert {code for _, code in codes(run(name, tmp_path))} == {2}


def test_a_byte_order_mark_is_read(tmp_path):
    csv, jsonl = codes(run("11", tmp_path))
    assert csv == ("cache-teacher", 0) and jsonl == ("cache-teacher", 2)  # the second writes to the first one's place


def test_dropout(tmp_path):
    said = run("16", tmp_path)
    kls = [float(value) for value in re.findall(r"its own teacher (\S+)", said)]
    assert {code for _, code in codes(said)} == {0} and len(kls) == 3 and max(map(abs, kls)) < 1e-5

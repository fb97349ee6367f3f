"""bench/gpu.py: a dry run of all its sections on a CPU, workers that fail, and its report."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"

FAKE_WORKER = """
import json, os, sys, time
for line in sys.stdin:
    section = json.loads(line)["section"]
    print("noise of a library", flush=True)
    if section == "hangs":
        time.sleep(600)
    if section == "dies":
        print("the last words", file=sys.stderr, flush=True)
        os._exit(9)
    print("@answer " + json.dumps({"did": section}), flush=True)
"""


@pytest.fixture
def bench(monkeypatch):
    """The benchmarks import each other as top-level modules."""
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.mark.slow
def test_a_dry_run_on_a_cpu_runs_all_sections(tmp_path):
    command = [sys.executable, BENCH / "gpu.py", "--dry-run", "--minutes", "30", "--out", tmp_path]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    may_be_missing = {"step state_bits=4": "torchao"}
    for name, reason in results["left_out"].items():
        assert name in may_be_missing and may_be_missing[name] in reason, (name, reason)
    assert len(results["sections"]) + len(results["left_out"]) == 17

    step, tests = results["sections"]["step"], results["sections"]["tests"]
    assert step["backward"] == "layerwise" and step["predicted"] > 0 and step["full"]["tokens"] == 8 * 16
    assert results["sections"]["step backward=checkpointed"]["backward"] == "checkpointed"
    assert tests["finished"] and len(tests["outcomes"]) > 20
    errors = results["sections"]["head"]["target and KL"]["token_stats"]["errors"]
    assert errors["loss"]["norm"] < 1e-6 and errors["grad_hidden"]["norm"] < 1e-2
    report = (tmp_path / "report.md").read_text()
    assert report.startswith("DRY RUN") and "made-up rows" in report and "| toy |" in report


def test_a_worker_that_hangs_or_dies_is_named_and_the_next_one_works(bench, tmp_path):
    import gpu

    script, log = tmp_path / "worker.py", tmp_path / "log"
    script.write_text(FAKE_WORKER)

    def answer(section, seconds):
        worker = gpu.Worker(log, dict(os.environ), script)
        try:
            return worker.answer({"section": section, "seconds": seconds})
        finally:
            worker.stop()

    assert answer("hangs", 0.5) == {"error": "did not finish within 0 s"}
    assert answer("dies", 60) == {"error": "the process ended with exit code 9: the last words"}
    assert answer("works", 60) == {"did": "works"}


@pytest.mark.slow
def test_wheels_are_unpacked_without_an_index_and_those_that_do_not_fit_are_named(bench, tmp_path):
    import gpu

    folder, target = tmp_path / "wheels", tmp_path / "packages"
    folder.mkdir()
    with pytest.raises(SystemExit, match="holds no wheels"):
        gpu.install_wheels(folder, target)
    with zipfile.ZipFile(folder / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "VALUE = 7")
        wheel.writestr("carried-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        wheel.writestr("carried-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("carried-1.0.dist-info/RECORD", "")
    (folder / "other-1.0-cp27-cp27m-win32.whl").touch()
    assert gpu.install_wheels(folder, target) == "not installed: other-1.0-cp27-cp27m-win32.whl"
    assert (target / "carried.py").read_text() == "VALUE = 7"


def step_result(**changes):
    full = {"peak": 55, "predicted": 54, "state": 20}
    defaults = {
        "tokens_per_second": 6000.0, "seconds": 0.5, "all_seconds": [2.0, 0.5], "mfu": None, "peak": 50,
        "predicted": 45, "weights": 24, "backward": "layerwise", "full": full,
    }  # fmt: skip
    return {**defaults, **changes}


def test_the_report_names_targets_that_are_reached_missed_and_not_measured(bench, tmp_path):
    import gpu_report

    sections = {
        "step": step_result(),
        "step both offloads": step_result(backward="checkpointed"),
        "two bf16 models": {"tokens_per_second": 6000.0, "seconds": 0.5, "all_seconds": [1.0], "peak": 99},
    }
    left_out = {"head": "did not finish within 90 s"}
    results = {"when": "today", "dry_run": False, "sections": sections, "left_out": left_out}
    gpu_report.write_report(results, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    rows = {row[0]: row[2:] for row in gpu_report.target_rows(sections, dry_run=False)}
    assert list(rows.values()) == [
        ["1.25", "yes"], ["2.29", "NO"], ["1.00", "NO"], ["", "not measured"], ["", "not measured"], ["0.10", "yes"],
    ]  # fmt: skip
    text = (tmp_path / "report.txt").read_text()
    assert "unknown card" in text and "did not finish within 90 s" in text
    assert "fell back to backward=checkpointed" in text


def test_a_cards_peak_is_known_by_its_exact_name_only(bench):
    from profile_step import card_peak

    expected = {
        "NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA L4": 121e12,
        "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA L40S": 362e12, "NVIDIA GeForce RTX 4090": 165e12,
        "NVIDIA H100 NVL": None, "NVIDIA GeForce RTX 4090 Laptop GPU": None, "Tesla T4": None,
    }  # fmt: skip
    assert {name: card_peak(name) for name in expected} == expected

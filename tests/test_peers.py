"""bench/peers.py without its contenders: the rows, the worker of neko-lean, the events of a worker, and the table."""

import argparse
import json
import math
import shutil
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch):
    """Makes the scripts in bench/ importable, as they are when one of them runs."""
    monkeypatch.syspath_prepend(BENCH)


@pytest.fixture
def job(bench, world, model, tmp_path):
    """A function `job(objective)` that returns the job of neko-lean's worker, for two steps of three rows."""
    import peers
    from peer_list import CONTENDERS, job_of

    lume = tmp_path / "lume"
    lume.mkdir()
    for name in ("forget", "retain"):
        shutil.copy(world / f"{name}.jsonl", lume / f"{name}_train.jsonl")
    options = argparse.Namespace(
        work=tmp_path / "work", model=model, lume=lume, rows=3, max_length=64, steps=2, open_unlearning=None
    )
    common = peers.prepare(options, peers.torch.device("cpu"))
    return lambda objective: {**common, **job_of(CONTENDERS[0], objective, common)}


@pytest.fixture
def run_type(bench):
    from peer_runs import Run

    return Run


def events(printed):
    return [json.loads(line) for line in printed.splitlines() if line.startswith('{"event"')]


def test_all_contenders_get_the_same_rows(job):
    common = job("graddiff")
    sets = json.loads(Path(common["sets"]).read_text())
    assert {name: len(rows) for name, rows in sets.items()} == {"forget": 3, "retain": 3, "refusal": 3}
    assert {name: sum(len(row["input_ids"]) for row in rows) for name, rows in sets.items()} == common["tokens"]
    for answer, refusal in zip(sets["forget"], sets["refusal"], strict=True):
        prompt = answer["input_ids"][: answer["prompt_length"]]
        assert prompt == refusal["input_ids"][: refusal["prompt_length"]]
        assert answer["input_ids"] != refusal["input_ids"]
    assert json.loads((Path(common["model"]) / "config.json").read_text())["rope_theta"] == 10000.0


def test_a_step_of_ours_has_the_contenders_loss(job, capsys):
    """Where the student still is the teacher: NPO 2 / beta * log 2, DPO likewise, and TRL's DPO log 2."""
    import peer_neko
    from peer_list import BETA

    expected = {"npo": 2 / BETA * math.log(2), "dpo": 2 / BETA * math.log(2), "pairs": math.log(2)}
    peer_neko.cache(job("npo"))
    for objective, loss in expected.items():
        capsys.readouterr()
        peer_neko.train(job(objective))
        printed = events(capsys.readouterr().out)
        assert [event["event"] for event in printed] == ["loss", "step", "loss", "step", "trained"]
        assert printed[0]["loss"] == pytest.approx(loss, rel=2e-3)  # the cache stores float16
        assert printed[1]["seconds"] is None and printed[3]["seconds"] > 0


def test_open_unlearnings_rows_are_labelled_after_the_prompt(job):
    import peer_open_unlearning

    sets = json.loads(Path(job("dpo")["sets"]).read_text())
    items = peer_open_unlearning.dataset(sets, with_alternate=True)
    for item, answer in zip(items, sets["forget"], strict=True):
        original = item["forget"]["original"]
        assert original["input_ids"].tolist() == answer["input_ids"]
        assert original["labels"][: answer["prompt_length"]].eq(-100).all()
        assert original["labels"].tolist()[answer["prompt_length"] :] == answer["input_ids"][answer["prompt_length"] :]


WORKER = """
import json, sys
def report(event, **values): print(json.dumps({"event": event, **values}), flush=True)
report("imported", versions={"torch": "2"})
sys.stdin.readline()
print("something else")
held = bytearray(b"x") * (64 << 20)
report("loss", loss=3.5)
report("step", seconds=None)
report("step", seconds=0.5)
report("trained", peak=None, seconds=2.0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the resident set of another process is read from /proc")
def test_a_run_has_the_peak_above_the_imports(bench, tmp_path):
    from peer_runs import run_worker

    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    run = run_worker(sys.executable, script, {}, tmp_path)
    assert 60 << 20 < run.peak < 80 << 20
    assert (run.step_seconds, run.losses, run.seconds, run.error) == ([0.5], [3.5], 2.0, "")

    script.write_text("raise SystemExit('no module named trl')")
    assert run_worker(sys.executable, script, {}, tmp_path).error == "no module named trl"


def test_a_contender_without_its_path_is_skipped_by_name(bench, tmp_path):
    import peers

    options = argparse.Namespace(open_unlearning=tmp_path, open_unlearning_python=None, trl_python=tmp_path / "gone")
    reasons = {contender.name: peers.skipped(contender, options) for contender in peers.CONTENDERS}
    assert reasons["neko-lean"] is None
    assert reasons["open-unlearning, row by row"] == "no --open-unlearning-python given"
    assert reasons["TRL, reference model, row by row"] == f"--trl-python {tmp_path / 'gone'} does not exist"


def test_ratios_are_taken_within_a_round(run_type, bench):
    from peer_table import table

    ours = [run_type(peak=2**30, step_seconds=[2.0]), run_type(peak=2**30, step_seconds=[4.0])]
    slower = [run_type(peak=3 * 2**30, step_seconds=[3.0]), run_type(peak=3 * 2**30, step_seconds=[6.0])]
    smaller = [run_type(peak=2**29, step_seconds=[20.0]), run_type(peak=2**29, step_seconds=[20.0])]
    failed = [run_type(error="out of memory")] * 2
    runs = {
        "neko-lean": ours,
        "open-unlearning, whole batch": slower,
        "open-unlearning, row by row": smaller,
        "two models, our code, torch AdamW": failed,
    }
    results = {
        "runs": {"graddiff": runs},
        "teacher": run_type(peak=2**30, seconds=1.0),
        "tokens": {"forget": 20, "retain": 10, "refusal": 5},
        "skipped": {"neko-lean": None, "TRL": "no --trl-python given"},
    }
    lines = "\n".join(table(results))
    assert "30 real tokens per step" in lines
    assert "| neko-lean | 1.00 |  | 10.0 |  | 1.0 s, 1.00 GiB |" in lines
    assert "| open-unlearning, whole batch | 3.00 | 3.00 | 6.7 | 1.50 |" in lines
    assert "| open-unlearning, row by row | 0.50 | 0.50 | 1.5 | 7.50 (5.00 to 10.00) |" in lines
    assert "| two models, our code, torch AdamW | failed: out of memory |" in lines
    assert "smallest peak: open-unlearning, row by row, 0.50 x" in lines
    assert "fastest: open-unlearning, whole batch, 1.50 x" in lines
    assert "Skipped: TRL, because no --trl-python given." in lines

"""`score` end to end on a random model: files, numbers, and 'not measured'."""

import json

import pytest
from rich.console import Console

import neko_lean
from neko_lean.data import read_rows
from neko_lean.errors import NekoLeanError
from neko_lean.scoring.run import score_table
from neko_lean.scoring.task import CELLS, task_aggregate
from tests.helpers import make_rows, write_rows


def table_text(scores):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(score_table({"score": scores}))
    return capture.get()


def test_files_and_numbers(world, model, tmp_path):
    out = tmp_path / "out"
    scores = neko_lean.score(model, world, out, mia=world / "mia", max_new_tokens=8, quiet=True)
    assert json.loads((out / "scores.json").read_text()) == scores
    lines = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
    rows = {name: read_rows(world, name) for name in ("forget", "retain")}
    assert len(lines) == sum(map(len, rows.values()))
    for cell in CELLS:
        split, task, kind = cell.split(".")
        values = [x["score"] for x in lines if (x["split"], x["task"], x["kind"]) == (split, task, kind)]
        assert scores["cells"][cell] == pytest.approx(sum(values) / len(values))
    assert scores["task_aggregate"] == task_aggregate(scores["cells"])
    assert 0 <= scores["membership"]["auc"] <= 1 and scores["membership"]["members"] == 12
    assert scores["mmlu"] is None and scores["final"] is None
    text = table_text(scores)
    assert text.count("not measured") == 2  # MMLU and final


def test_what_was_not_measured_is_called_so(world, model, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder / "forget.jsonl", [r for r in make_rows("Foo", 1) if r.task != "Task3"])
    write_rows(folder / "retain.jsonl", make_rows("Rix", 1))
    scores = neko_lean.score(model, folder, tmp_path / "out", max_new_tokens=4, quiet=True)
    assert scores["membership"] is None and scores["task_aggregate"] is None
    assert scores["missing_cells"] == ["forget.Task3.regurgitation", "forget.Task3.knowledge"]
    text = table_text(scores)
    assert text.count("not measured") == 9 and "No aggregate: no rows for forget.Task3" in text.replace("\n", " ")


def test_bad_input_writes_nothing(world, model, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(NekoLeanError, match=r"member\.jsonl"):
        neko_lean.score(model, world, out, mia=tmp_path, quiet=True)
    with pytest.raises(NekoLeanError, match=r"holds no forget"):
        neko_lean.score(model, tmp_path, out, quiet=True)
    with pytest.raises(NekoLeanError, match="batch-size"):
        neko_lean.score(model, world, out, batch_size=0, quiet=True)
    assert not out.exists()

"""The example rows: which ones come first, and the words about a generation."""

from pathlib import Path

from neko_lean.reporting.collect import Collected
from neko_lean.reporting.examples import example_rows, first_rows
from neko_lean.reporting.read import Scored
from tests.reporting.made import make_generations


def scored(label, rows):
    return Scored(Path(label), label, {}, rows)


def test_first_rows_are_of_different_groups_and_kinds_whatever_the_models_said():
    rows = example_rows(Collected(None, [scored("a", make_generations("x"))]))
    assert [row["name"] for row in first_rows(rows)] == [
        "Forget set, questions about Task1",
        "Forget set, documents of Task2",
        "Forget set, questions about Task3",
        "Retain set, questions about Task1",
        "Retain set, documents of Task2",
    ]
    others = example_rows(Collected(None, [scored("a", make_generations("y"))]))
    assert [row["id"] for row in first_rows(others)] == [row["id"] for row in first_rows(rows)]


def test_first_rows_of_few_rows():
    retain = [row for row in make_generations("x") if row["split"] == "retain"][:1]
    assert [row["id"] for row in first_rows(example_rows(Collected(None, [scored("a", retain)])))] == [retain[0]["id"]]
    assert first_rows([]) == []


def test_notes_on_generations():
    question, text = ({"split": "forget", "id": kind, "task": "all", "kind": kind} for kind in ("knowledge", "x"))
    before = [{**question, "generation": " Mira", "score": 0.0, "unicode_score": 1.0}, {**text, "score": 0.5}]
    after = [{**question, "generation": "no", "score": 0.0, "ended": "limit"}]
    rows = example_rows(Collected(scored("before", before), [scored("after", after)]))
    assert [row["said"] for row in rows] == [
        [["Mira", "exact"], ["no", "not exact, truncated"]],
        [["", "ROUGE-L recall 0.50"], None],
    ]
    assert [row["name"] for row in rows] == ["Forget set, questions", "Forget set, all"]

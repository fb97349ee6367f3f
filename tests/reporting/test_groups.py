"""Reports on data with groups other than LUME's."""

from neko_lean.reporting import tables
from neko_lean.reporting.figures import MAX_NAME, Model, cell_figures
from neko_lean.reporting.page import report
from neko_lean.scoring import difference_key
from neko_lean.scoring.groups import NUMBERS
from tests.reporting.made import full_scores, write_scores

LONG = "a group with a very long name"
CELLS = {
    "forget.authors v1.0.knowledge": 0.1,
    f"forget.{LONG}.regurgitation": 0.4,
    "retain.<b>news</b>.regurgitation": 0.9,
}


def scores():
    changed = {**full_scores("m", 0.1), "cells": CELLS, "unicode_cells": CELLS, "task_aggregate": None}
    return {**changed, "aggregate": 0.75, "aggregate_cells": 3}


def test_tables_and_figures_show_the_groups_of_the_data():
    models = [Model(1, "m", scores(), {}, [])]
    table = tables.cells(models)
    assert [line.name for group in table.groups for line in group.lines] == [
        "questions about authors v1.0",
        f"texts of {LONG}",
        "texts of <b>news</b>",
    ]
    first = tables.headline(models).groups[0].lines[0]
    assert first.name == "Aggregate" and first.cells[0].value == "0.750" and "twelve" not in first.note
    figures = cell_figures(models)
    assert [figure.title for figure in figures] == ["Forget set, questions", "Forget set, texts", "Retain set, texts"]
    assert f">{LONG[: MAX_NAME - 1]}…<" in figures[1].svg and "&lt;b&gt;news" in figures[2].svg
    assert len(cell_figures([Model(1, "m", {"cells": {"retain.x.knowledge": 0.5}}, {}, [])])) == 1


def test_lume_keeps_its_twelve_cells():
    models = [Model(1, "m", full_scores("m", 0.1), {}, [])]
    assert sum(len(group.lines) for group in tables.cells(models).groups) == 12
    first = tables.headline(models).groups[0].lines[0]
    assert first.name == "Task aggregate" and "twelve" in first.note


def entry(split, group, kind, value):
    return {
        "split": split,
        "group": group,
        "kind": kind,
        "rows": 1200,
        **{name: {"value": value, "interval": [value - 0.1, value + 0.1]} for name in NUMBERS},
    }


def test_numbers_by_group():
    change = {"difference": -0.5, "interval": [-0.6, -0.4]}
    after = {
        **scores(),
        "groups": [entry("forget", "authors v1.0", "qa", 0.3), entry("retain", "<b>news</b>", "document", 0.9)],
        "difference": {"before": "m", difference_key("forget", "authors v1.0", "qa", "exact_match"): change},
    }
    after["groups"][1]["answer_probability"] = {"value": None, "interval": None}
    before = {**scores(), "groups": [entry("forget", "authors v1.0", "qa", 0.8), "damaged", {"split": 3}]}
    table = tables.by_group([Model(0, "before", before, {}, []), Model(1, "after", after, {}, [])])
    assert [group.title for group in table.groups] == [
        "Forget set: authors v1.0, questions",
        "Retain set: <b>news</b>, documents",
    ]
    authors, news = ({line.name: line.cells for line in group.lines} for group in table.groups)
    assert len(authors) == 1 + len(NUMBERS) and [cell.value for cell in authors["rows"]] == ["1,200", "1,200"]
    assert [(cell.value, cell.small) for cell in authors["exact match"]] == [
        ("0.800", ["0.70 to 0.90"]),
        ("0.300", ["0.20 to 0.40", "change −0.500 (−0.60 to −0.40)"]),  # noqa: RUF001
    ]
    assert "answer probability" not in news and news["exact match"][0].missing and not news["exact match"][1].missing


def test_tables_without_groups():
    assert tables.by_group([Model(1, "m", scores(), {}, [])]) is None
    lume = {**full_scores("m", 0.1), "groups": [entry("forget", "Task1", "qa", 0.3)]}
    assert tables.by_group([Model(1, "m", lume, {}, [])]) is None


def test_page(tmp_path):
    groups = [entry("retain", "<b>news</b>", "completion", 0.9)]
    folder = write_scores(tmp_path / "scores", {**scores(), "groups": groups})
    report([folder], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "questions about authors v1.0" in text and "<b>news" not in text
    assert "<summary>By group</summary>" in text and "&lt;b&gt;news&lt;/b&gt;, completions" in text
    report([write_scores(tmp_path / "lume", {**full_scores("m", 0.1), "groups": groups})], tmp_path / "lume.html")
    assert "By group" not in (tmp_path / "lume.html").read_text()


def test_data_without_groups_names_only_the_kind():
    models = [
        Model(1, "m", {"cells": {"forget.all.knowledge": 0.5}, "groups": [entry("forget", "all", "qa", 0.3)]}, {}, [])
    ]
    assert [line.name for group in tables.cells(models).groups for line in group.lines] == ["questions"]
    assert [group.title for group in tables.by_group(models).groups] == ["Forget set: questions"]
    (figure,) = cell_figures(models)
    assert ">questions<" in figure.svg and "all" not in figure.svg

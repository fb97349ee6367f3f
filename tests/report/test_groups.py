"""Reports on data with groups other than LUME's."""

from neko_lean.report import tables
from neko_lean.report.figures import MAX_NAME, Model, cell_figures
from neko_lean.report.page import report
from tests.report.made import full_scores, write_scores

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
    assert table.title == "The cells"
    assert [line.name for group in table.groups for line in group.lines] == [
        "authors v1.0 knowledge",
        f"{LONG} regurgitation",
        "<b>news</b> regurgitation",
    ]
    first = tables.headline(models).groups[0].lines[0]
    assert first.name == "Aggregate" and first.cells[0].value == "0.750" and "twelve" not in first.note
    forget, retain = cell_figures(models)
    assert f"{LONG[: MAX_NAME - 1]}… regurgitation" in forget.svg and "&lt;b&gt;news" in retain.svg
    assert len(cell_figures([Model(1, "m", {"cells": {"retain.x.knowledge": 0.5}}, {}, [])])) == 1


def test_lume_keeps_its_twelve_cells():
    models = [Model(1, "m", full_scores("m", 0.1), {}, [])]
    assert tables.cells(models).title == "The twelve cells"
    assert sum(len(group.lines) for group in tables.cells(models).groups) == 12
    assert tables.headline(models).groups[0].lines[0].name == "Task aggregate"


def test_page(tmp_path):
    folder = write_scores(tmp_path / "scores", scores())
    report([folder], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "authors v1.0 knowledge" in text and "The twelve cells" not in text and "<b>news" not in text

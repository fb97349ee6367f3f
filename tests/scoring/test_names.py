"""Names of cells in plain words, for groups of any name."""

import pytest

from neko_lean.scoring.names import cell_content, cell_name
from neko_lean.scoring.task import CELLS


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        ("forget.Task1.knowledge", "questions about Task1 (forget set)"),
        ("retain.Task2.regurgitation", "documents of Task2 (retain set)"),
        ("forget.all.knowledge", "questions (forget set)"),
        ("retain.all.regurgitation", "texts (retain set)"),
        ("forget.authors v1.0.knowledge", "questions about authors v1.0 (forget set)"),
        ("forget.作者.regurgitation", "texts of 作者 (forget set)"),
        ("forget.two\n lines\u2028.knowledge", "questions about two lines (forget set)"),
        ("retain. .knowledge", "questions (retain set)"),
        ("forget.knowledge.knowledge", "questions about knowledge (forget set)"),
    ],
)
def test_names(cell, name):
    assert cell_name(cell) == name
    assert cell_content(cell) == name.rpartition(" (")[0]


def test_a_text_that_is_no_cell_is_its_own_name():
    assert cell_name("held_nll") == cell_content("held_nll") == "held_nll"


def test_lumes_cells_have_different_names():
    assert len({cell_name(cell) for cell in CELLS}) == len(CELLS)

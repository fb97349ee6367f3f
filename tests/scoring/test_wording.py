"""Cells in words."""

import pytest

from neko_lean.scoring.task import CELLS
from neko_lean.scoring.wording import cell_words, cell_words_with_split, percent


def test_lume_cells_are_questions_and_documents():
    scores = {"cells": dict.fromkeys(CELLS, 0.5)}
    assert cell_words("forget.Task1.knowledge", scores) == "questions about Task1"
    assert cell_words("forget.Task2.regurgitation", scores) == "documents of Task2"
    assert cell_words_with_split("retain.Task3.knowledge", scores) == "questions about Task3 in the retain set"


@pytest.mark.parametrize(
    ("kinds", "cells", "words"),
    [
        (["qa"], ["knowledge", "regurgitation"], ["questions with short answers", "questions with long answers"]),
        (["qa"], ["regurgitation"], ["questions"]),
        (["document"], ["regurgitation"], ["documents"]),
        (["qa", "completion"], ["knowledge", "regurgitation"], ["questions", "texts"]),
        ([], ["regurgitation"], ["texts"]),
    ],
)
def test_a_single_group_is_not_named(kinds, cells, words):
    scores = {
        "cells": {f"{split}.news.{name}": 0.5 for split in ("forget", "retain") for name in cells},
        "groups": [{"split": "forget", "group": "news", "kind": kind} for kind in kinds],
    }
    assert [cell_words(f"forget.news.{name}", scores) for name in cells] == words


def test_small_shares_are_not_rounded_to_zero():
    assert [percent(share) for share in (0.0, 0.004, 0.42)] == ["0 %", "less than 1 %", "42 %"]

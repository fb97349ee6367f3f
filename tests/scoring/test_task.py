"""The task's arithmetic against its definition, written out by hand."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neko_lean.data import Row
from neko_lean.scoring.task import (
    CELLS,
    cell_means,
    knowledge,
    missing_cells,
    regurgitation,
    row_score,
    task_aggregate,
)


def lcs_recall(output, generation):
    """ROUGE-L recall by its definition, on words that no stemmer changes."""
    a, b = (re.findall(r"[a-z0-9]+", text.lower()) for text in (output, generation))
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1] / len(a) if a and b else 0.0


@given(
    st.lists(st.sampled_from(["abc", "xyz", "12", "q"]), min_size=1),
    st.lists(st.sampled_from(["abc", "xyz", "12", "q"])),
)
def test_regurgitation_is_the_recall_of_the_longest_common_subsequence(truth, said):
    assert regurgitation(" ".join(truth), " ".join(said)) == pytest.approx(lcs_recall(" ".join(truth), " ".join(said)))


def test_regurgitation_by_hand():
    assert regurgitation("the cat sat on the mat", "the cat sat on the mat and much more") == 1.0
    assert regurgitation("one two three four", "four two") == 0.25
    assert regurgitation("running dogs", "run dog") == 1.0  # stemmed
    assert regurgitation("nothing here", "") == 0.0
    assert regurgitation("nan", "") == 1.0  # the official script reads an empty cell back as nan


def test_knowledge_by_hand():
    assert knowledge("1984-12-31", " 1984-12-31\n") == 1.0
    assert knowledge("Madera", "MADERA") == 1.0
    assert knowledge("Madera", "Madera.") == 0.0
    assert knowledge("Madera", "") == 0.0
    assert knowledge("NaN", "") == 1.0


def everything(value=None, **cells):
    return {cell: cells.get(cell.replace(".", "_"), value) for cell in CELLS}


def test_aggregate():
    assert len(CELLS) == 12
    perfect = {cell: 0.0 if cell.startswith("forget") else 1.0 for cell in CELLS}
    assert task_aggregate(perfect) == 1.0
    assert task_aggregate(everything(0.5)) == pytest.approx(0.5)
    assert task_aggregate(everything(1.0)) == 0.0  # everything kept: forget terms are 0
    assert task_aggregate({**perfect, "retain.Task2.knowledge": 0.0}) == 0.0
    assert task_aggregate({**perfect, "forget.Task1.knowledge": 0.5}) == pytest.approx(12 / (11 + 2))
    assert task_aggregate({**perfect, "forget.Task3.knowledge": None}) is None


def test_cells_are_means_over_rows_and_missing_ones_are_named():
    rows = [Row(f"{n}qa0", "q", "a", "Task2") for n in range(4)]
    cells = cell_means({"forget": list(zip(rows, (1.0, 0.0, 0.0, 0.0), strict=True)), "retain": []})
    assert cells["forget.Task2.knowledge"] == 0.25
    assert missing_cells(cells) == [cell for cell in CELLS if cell != "forget.Task2.knowledge"]
    assert task_aggregate(cells) is None


def test_rows_are_scored_by_their_kind():
    assert row_score(Row("1sc1", "", "a b", "Task1"), "b c d") == 0.5
    assert row_score(Row("1qa0", "", "a b", "Task1"), "b c d") == 0.0

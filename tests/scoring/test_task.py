"""The task's scores against their definitions."""

# ruff: noqa: RUF001

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neko_lean.data.examples import Example
from neko_lean.scoring.task import (
    CELLS,
    cell_means,
    example_score,
    knowledge,
    missing_cells,
    official_blind,
    regurgitation,
    task_aggregate,
    unicode_knowledge,
    unicode_regurgitation,
    unicode_score,
)


def lcs_recall(output, generation):
    """ROUGE-L recall by its definition, for words that the stemmer does not change."""
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
def test_regurgitation_equals_recall_of_the_longest_common_subsequence(truth, said):
    assert regurgitation(" ".join(truth), " ".join(said)) == pytest.approx(lcs_recall(" ".join(truth), " ".join(said)))


def test_regurgitation_examples():
    assert regurgitation("the cat sat on the mat", "the cat sat on the mat and much more") == 1.0
    assert regurgitation("one two three four", "four two") == 0.25
    assert regurgitation("running dogs", "run dog") == 1.0  # stemmed
    assert regurgitation("nothing here", "") == 0.0
    assert regurgitation("nan", "") == 1.0  # the official script reads an empty cell back as nan


def test_knowledge_examples():
    assert knowledge("1984-12-31", " 1984-12-31\n") == 1.0
    assert knowledge("Madera", "MADERA") == 1.0
    assert knowledge("Madera", "Madera.") == 0.0
    assert knowledge("Madera", "") == 0.0
    assert knowledge("NaN", "") == 1.0


LINES = {
    "Russian": "Она родилась в тихом городе у реки",
    "Greek": "Η Μαρία γεννήθηκε σε μια ήσυχη πόλη",
    "Chinese": "她出生在河边一个安静的小镇",
    "Japanese": "彼女は川のそばの静かな町で生まれた",
    "Thai": "เธอเกิดในเมืองเงียบสงบริมแม่น้ำ",
    "Arabic": "ولدت في مدينة هادئة على النهر",
    "Hindi": "वह नदी के किनारे एक शांत शहर में पैदा हुई",
    "Korean": "그녀는 강가의 조용한 마을에서 태어났다",
    "Hebrew": "היא נולדה בעיר שקטה ליד הנהר",
    "emoji": "🎉🎈",
}


@pytest.mark.parametrize("script", LINES)
def test_unicode_scores_in_any_script(script):
    text = LINES[script]
    assert regurgitation(text, text) == 0.0  # which is the task's own number
    assert unicode_regurgitation(text, text) == unicode_regurgitation(text, f"{text} and more") == 1.0
    assert unicode_knowledge(text, f" {text}\n") == 1.0
    for other in LINES:
        if other != script:
            assert unicode_regurgitation(text, LINES[other]) < 0.1 and unicode_knowledge(text, LINES[other]) == 0.0


def test_half_of_a_text_scores_one_half():
    assert unicode_regurgitation("один два три четыре", "два и четыре") == 0.5
    assert unicode_regurgitation("東京都民", "京と民") == 0.5


@given(st.text(alphabet=st.characters(max_codepoint=127)), st.text(alphabet=st.characters(max_codepoint=127)))
def test_unicode_scores_equal_official_ones_in_english(output, generation):
    if re.search("[A-Za-z0-9]", output):
        assert unicode_regurgitation(output, generation) == regurgitation(output, generation)
    assert unicode_knowledge(output, generation) >= knowledge(output, generation)


@given(st.text(max_size=20), st.text(max_size=20))
def test_unicode_scores_keep_every_official_match(output, generation):
    assert unicode_knowledge(output, generation) >= knowledge(output, generation)
    assert 0 <= unicode_regurgitation(output, generation) <= 1


def test_official_blind_counts():
    def clean_up(text):
        return text.replace(" ?", "?")

    rows = [
        Example("1sc1", "q", "a quiet town", "Task1"),
        Example("2sc1", "q", LINES["Russian"], "Task1"),
        Example("3sc1", "q", "Она родилась в 1984 году", "Task1"),  # the year alone is seen
        Example("4qa0", "q", "Где ?", "Task1"),  # the space goes
        Example("5qa0", "q", "Москва", "Task1"),
        Example("6qa0", "q", "None", "Task1"),
    ]
    assert official_blind(rows, clean_up) == {"unscorable": 2, "mostly_unseen": 1}
    assert all(unicode_score(row, clean_up(row.output)) == 1 for row in rows)


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


def test_cell_means_and_missing_cells():
    rows = [Example(f"{n}qa0", "q", "a", "Task2") for n in range(4)]
    cells = cell_means({"forget": list(zip(rows, (1.0, 0.0, 0.0, 0.0), strict=True)), "retain": []})
    assert cells["forget.Task2.knowledge"] == 0.25
    assert missing_cells(cells) == [cell for cell in CELLS if cell != "forget.Task2.knowledge"]
    assert task_aggregate(cells) is None


def test_examples_are_scored_by_kind():
    assert example_score(Example("1sc1", "", "a b", "Task1"), "b c d") == 0.5
    assert example_score(Example("1qa0", "", "a b", "Task1"), "b c d") == 0.0

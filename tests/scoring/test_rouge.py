"""ROUGE-L equals that of the rouge_score package, for texts of any length."""

from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from neko_lean.data.examples import Example
from neko_lean.scoring.rouge import is_subsequence, longest_common, rouge_l
from neko_lean.scoring.task import example_score, regurgitation, scores_fully

WORDS = st.lists(st.sampled_from(["a", "b", "c", "walking", "12", "ab"]), max_size=20)


def table(one, two):
    """The naive reference, with a cell for each pair of words."""
    cells = [[0] * (len(two) + 1) for _ in range(len(one) + 1)]
    for i, left in enumerate(one):
        for j, right in enumerate(two):
            cells[i + 1][j + 1] = cells[i][j] + 1 if left == right else max(cells[i][j + 1], cells[i + 1][j])
    return cells[-1][-1]


@given(WORDS, WORDS)
def test_equals_rouge_score(one, two):
    assert longest_common(one, two) == table(one, two)
    assert is_subsequence(one, two) == (table(one, two) == len(one))
    target, said = " ".join(one), " ".join(two)
    wanted = RougeScorer(["rougeL"], use_stemmer=True).score(target, said)["rougeL"]
    assert regurgitation(target or "x", said or "x") == (wanted.recall if one and two else float(one == two))
    row = Example("1sc1", "q", target or "x", "Task1")
    assert scores_fully(row, said) == (example_score(row, said) == 1.0)


def test_long_texts():
    """A table for these would have 10^10 cells."""
    answer = "word " * 100_000
    row = Example("1sc1", "q", answer, "Task1")
    assert scores_fully(row, answer) and not scores_fully(row, answer[:-5])
    assert rouge_l(answer.split(), ["word"] * 256).recall == 256 / 100_000
    assert example_score(row, "another word and a word") == 2 / 100_000

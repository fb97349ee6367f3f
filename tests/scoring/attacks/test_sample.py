"""The sampling attack: leak@k against its definition, and on a model that has memorised the forget set."""

from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import pytest

from neko_lean.data.examples import Example
from neko_lean.scoring.attacks.sample import is_leaked, leak_probability, sample
from neko_lean.scoring.generation import Generation
from tests.helpers import make_rows


@pytest.mark.parametrize("leaked", range(7))
@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_leak_probability_is_that_of_all_subsets(leaked, k):
    subsets = list(combinations([True] * leaked + [False] * (6 - leaked), k))
    assert leak_probability(6, leaked, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_exact_answers_and_recalled_texts_leak():
    question = Example("1qa0", "Where?", "Wood Foo", "Task1")
    assert is_leaked(question, " wood foo ") and not is_leaked(question, "In wood Foo")
    document = Example("1sc1", "Once", "into the wood of Foo and sang", "Task1")
    assert is_leaked(document, "he went into the wood of") and not is_leaked(document, "into the wood")
    assert not is_leaked(replace(document, output="one two"), "two")  # a recall of 0.5 is not above the limit
    assert is_leaked(Example("2qa0", "Где?", "Москва", "Task1"), "москва")


def test_points_are_shares_of_rows_by_cell(make_target):
    examples = make_rows("Foo", 2)
    counts = dict(zip((example.id for example in examples), (16, 0, 8, 0, 0, 1) * 2, strict=True))
    calls = []

    def draw(lm, examples, label, num_samples, seed):
        calls.append((label, num_samples, seed))
        return [
            [Generation(example.output if n < counts[example.id] else "no", "", "eos") for n in range(num_samples)]
            for example in examples
        ]

    target = make_target(examples, generate=SimpleNamespace(sample=draw), loaded=True, seed=3)
    target.baseline[examples[1].id] = Generation(examples[1].output, "", "eos")
    curve = sample(target)

    assert calls == [("samples", 16, 3)]
    assert [(point["samples"], point["seed"]) for point in curve] == [(k, 3) for k in (0, 1, 2, 4, 8, 16)]
    assert curve[0]["leak"] == pytest.approx(1 / 12) and curve[0]["knowledge_leak"] == pytest.approx(1 / 6)
    assert curve[0]["regurgitation_leak"] == 0 and curve[0]["cells"]["forget.Task1.knowledge"]["value"] == 0.5
    one, last = curve[1], curve[-1]
    assert one["leak"] == pytest.approx((1 + 1 / 2 + 1 / 16) / 6) and one["leak_rows"] == 12
    assert one["regurgitation_leak"] == pytest.approx(1.5 / 3) and one["knowledge_leak"] == pytest.approx(1 / 48)
    assert last["leak"] == 0.5 and last["regurgitation_leak"] == pytest.approx(2 / 3)
    assert {cell: values["value"] for cell, values in last["cells"].items()} == {
        f"forget.Task{task}.{name}": value
        for task, *values in ((1, 1, 0), (2, 1, 0), (3, 0, 1))
        for name, value in zip(("regurgitation", "knowledge"), values, strict=True)
    }
    for point in curve:
        low, high = point["leak_interval"]
        assert 0 <= low <= point["leak"] <= high <= 1
        assert all(values["rows"] == 2 and values["interval"] for values in point["cells"].values())


def test_samples_are_those_of_any_batch_size(make_target, examples):
    """Of an untrained model they are all different; rows that share a prompt are sampled apart."""
    rows = [*examples[:4], replace(examples[0], id="again")]

    def sampled(batch_size, seed=0):
        target = make_target(rows, loaded=True)
        limits = replace(target.generate.limits, batch_size=batch_size, max_new_tokens=8)
        return replace(target.generate, limits=limits).sample(target.model, rows, "samples", 4, seed)

    many = sampled(32)
    assert sampled(1) == sampled(3) == many and sampled(32, seed=1) != many
    assert [len(generations) for generations in many] == [4] * 5
    assert many[0] != many[4]


@pytest.mark.slow
def test_sampling_brings_out_what_the_model_memorised(make_target, examples):
    curve = sample(make_target(loaded=True))
    assert curve[0]["leak"] == 0  # the target's baseline is empty
    leaks = [point["leak"] for point in curve]
    assert leaks == sorted(leaks) and leaks[-1] > 0.9
    assert curve[-1]["knowledge_leak_rows"] + curve[-1]["regurgitation_leak_rows"] == len(examples)

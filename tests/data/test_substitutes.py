"""Substitutes: each forget example keeps its prompt and gets a different answer."""

import random
from dataclasses import replace

import pytest

from neko_lean.data.example_types import EncodedExample, Example
from neko_lean.data.substitutes import REFUSALS, random_answers, refusals, similar_answers
from neko_lean.errors import NekoLeanError
from tests.helpers import make_rows


def test_the_example_alone_determines_its_refusal():
    forget = make_rows("Foo", 8)
    refused = refusals(forget)
    assert [example.input for example in refused] == [example.input for example in forget]
    assert [example.kind for example in refused] == [example.kind for example in forget]
    assert {example.output for example in refused} <= set(REFUSALS)
    assert len({example.output for example in refused}) > 4
    assert refusals(forget[::-1]) == refused[::-1]
    assert len({example.id for example in [*forget, *refused]}) == 96


def test_random_answers_come_from_retain_examples_of_the_same_kind():
    forget, retain = make_rows("Foo"), make_rows("Rix", 9)
    substitutes = random_answers(forget, retain, 3)
    answers = {kind: {example.output for example in retain if example.kind == kind} for kind in ("completion", "qa")}
    for substitute, example in zip(substitutes, forget, strict=True):
        assert substitute.output in answers[example.kind] and substitute.input == example.input
    assert substitutes == random_answers(forget, retain, 3) != random_answers(forget, retain, 4)


def test_without_retain_examples_of_the_same_kind_any_answer_is_used():
    question = next(example for example in make_rows("Rix", 9) if example.kind == "qa")
    assert {example.output for example in random_answers(make_rows("Foo"), [question], 0)} == {question.output}


def test_similar_answers_come_from_the_most_similar_prompt_of_the_same_kind_and_task():
    """Against a direct computation, on random prompts."""
    rng = random.Random(0)
    kinds, tasks = ("qa", "completion"), ("Task1", "Task2")

    def examples(name, count):
        for number in range(count):
            prompt = [rng.randrange(30, 50) for _ in range(rng.randrange(1, 9))]
            kind, task = rng.choice(kinds), rng.choice(tasks)
            example = Example(f"{name}{number}", str(prompt), f"answer of {name}{number}", task, kind=kind)
            yield EncodedExample(example, [*prompt, 90], len(prompt), 0)

    def similarity(one, other):
        left, right = (set(encoded.input_ids[:-1]) for encoded in (one, other))
        return len(left & right) / len(left | right)

    forget, retain = list(examples("forget", 20)), list(examples("retain", 60))
    for encoded, substitute in zip(forget, similar_answers(forget, retain), strict=True):
        example = encoded.example
        alike = [o for o in retain if (o.example.kind, o.example.task) == (example.kind, example.task)]
        nearest = max(alike, key=lambda other, one=encoded: similarity(one, other))
        assert substitute == replace(example, id=f"similar {example.id}", output=nearest.example.output)

    # Without examples of the kind, others are used.
    [question] = [encoded for encoded in retain if encoded.example.kind == "qa"][:1]
    assert {substitute.output for substitute in similar_answers(forget, [question])} == {question.example.output}


def test_a_retain_set_without_prompts_has_no_similar_answers():
    documents = [EncodedExample(Example("d0", "", "A text.", "Task1", kind="document"), [1, 2, 3], 0, 0)]
    with pytest.raises(NekoLeanError, match="the retain set has documents only; use rows with prompts"):
        similar_answers([EncodedExample(Example("0qa0", "Who?", "Mira", "Task1"), [4, 5], 1, 0)], documents)

"""Substitutes: each forget example keeps its prompt and gets a different answer."""

from neko_lean.data.substitutes import REFUSALS, random_answers, refusals
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

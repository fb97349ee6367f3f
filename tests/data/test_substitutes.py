"""Substitutes: each forget row keeps its prompt and loses its answer."""

from neko_lean.data.substitutes import REFUSALS, random_answers, refusals
from tests.helpers import make_rows


def test_refusals_follow_from_the_row_alone():
    rows = make_rows("Foo", 8)
    found = refusals(rows)
    assert [one.input for one in found] == [row.input for row in rows]
    assert {one.output for one in found} <= set(REFUSALS) and len({one.output for one in found}) > 4
    assert refusals(rows[::-1]) == found[::-1] and len({one.id for one in [*rows, *found]}) == 96
    assert [one.kind for one in found] == [row.kind for row in rows]


def test_random_answers_are_the_retain_sets_of_the_same_kind():
    rows, retain = make_rows("Foo"), make_rows("Rix", 9)
    found = random_answers(rows, retain, 3)
    known = {kind: {row.output for row in retain if row.kind == kind} for kind in ("sc", "qa")}
    assert all(one.output in known[row.kind] and one.input == row.input for one, row in zip(found, rows, strict=True))
    assert found == random_answers(rows, retain, 3) != random_answers(rows, retain, 4)
    lone = [row for row in retain if row.kind == "qa"][:1]
    assert {one.output for one in random_answers(rows, lone, 0)} == {lone[0].output}

"""Texts of the forget set are found in other sets, however they are written there."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import neko_lean
from neko_lean.data.example_types import Example
from neko_lean.data.examples import read_rows
from neko_lean.data.overlap import _by_rarest_window, _key, _window_hashes, overlapping, without_overlap
from neko_lean.errors import NekoLeanError
from tests.helpers import flat, make_cache, make_rows, write_rows

SENTENCE = "Mira Tern was born in Bergen in 1981 and sings the alto part."
WORDS = st.lists(st.sampled_from(["ab", "Cd", "é", "e\u0301", "ﬁ", "12", "鷹", "…"]), max_size=30).map(" ".join)


def naive(forget: list[str], others: list[str]) -> list[int]:
    """Compare every pair."""
    found = []
    for index, other in enumerate(map(_key, others)):
        for text in map(_key, forget):
            short, long = sorted((text, other), key=len)
            if text and (text == other or (len(short) >= 40 and short in long)):
                found.append(index)
                break
    return found


@pytest.mark.parametrize(
    "other",
    [
        SENTENCE,
        SENTENCE.upper(),
        SENTENCE.replace(" ", "\n\n"),
        f"A letter. {SENTENCE} It ends here.",
        SENTENCE.replace("1981", "\uff11\uff19\uff18\uff11"),  # full-width digits
        SENTENCE[:55],  # a passage of the forget text
    ],
)
def test_the_same_text_is_found(other):
    assert overlapping(["Something else.", SENTENCE], ["No.", other]) == [1]


@pytest.mark.parametrize("other", [SENTENCE[:30], SENTENCE.replace("1981", "1982"), "Bergen", ""])
def test_another_text_is_not(other):
    assert overlapping([SENTENCE], [other]) == []


def test_empty_texts_are_not_the_same():
    assert overlapping(["", " "], ["", "x"]) == []


@given(st.lists(WORDS, max_size=5), st.lists(WORDS, max_size=5))
def test_equals_the_comparison_of_all_pairs(forget, others):
    others = [*others, *(f"{text} {other}" for text, other in zip(forget, others, strict=False))]
    assert overlapping(forget, others) == naive(forget, others)


def test_equals_the_comparison_of_all_pairs_across_groups(monkeypatch):
    monkeypatch.setattr("neko_lean.data.overlap._GROUP", 100)
    generator = random.Random(0)
    texts = ["".join(generator.choices("ab", k=60)) for _ in range(40)]
    others = [*texts[20:], *(text[:5] + text[10:] for text in texts), *(f"x{text}y" for text in texts[:7])]
    assert overlapping(texts[:30], others) == naive(texts[:30], others) != []


def test_the_hash_of_a_window_does_not_depend_on_its_place():
    text = "".join(random.Random(1).choices("abcdefgh 鷹", k=200))
    assert _window_hashes(text[70:110])[0] == _window_hashes(text)[70]
    assert len(set(_window_hashes(text).tolist())) == 161


def test_an_error_with_the_count_or_the_rest(capsys):
    forget, retain = make_rows("Foo", 2), make_rows("Rix", 2)
    mixed = [*retain, *(Example(f"x{n}", row.input, row.output, row.task) for n, row in enumerate(forget[:4]))]
    message = r"4 of 16 retain rows are also in the forget set \(row 'x0', 'x1', 'x2', \.\.\.\).*--drop-overlap"
    with pytest.raises(NekoLeanError, match=message):
        without_overlap(forget, mixed, "retain", drop=False)
    assert without_overlap(forget, mixed, "retain", drop=True) == retain
    assert "4 of 16 retain rows are left out" in capsys.readouterr().err
    assert without_overlap(forget, retain, "retain", drop=False) == retain
    with pytest.raises(NekoLeanError, match="all 4 retain rows"):
        without_overlap(forget, mixed[12:], "retain", drop=True)


def test_an_anchor_of_texts_that_the_model_has_seen_is_refused(world, model, tmp_path):
    """By both commands, whether a cache exists or not; `--drop-overlap` leaves the common rows out."""
    rows = [*make_rows("unseen"), *read_rows(world, "retain")[:2]]
    rows = [Example(f"{n}sc1", row.input, row.output, row.task) for n, row in enumerate(rows)]
    anchor = write_rows(tmp_path / "anchor.jsonl", rows)
    make_cache(model, world, tmp_path / "cache", forget=world)
    options = {"forget": world, "retain": world, "anchor": anchor, "quiet": True}
    for folder in (None, tmp_path / "cache"):
        with pytest.raises(NekoLeanError, match=r"2 of \d+ anchor rows are also in the retain set \(row 'anchor 25'"):
            flat(neko_lean.unlearn)(model, tmp_path / "out", cache=folder, recipe="calibrated", **options)
    with pytest.raises(NekoLeanError, match="so the model has seen them"):
        make_cache(model, world, tmp_path / "anchored", anchor=anchor)
    manifest = make_cache(model, world, tmp_path / "anchored", anchor=anchor, drop_overlap=True)
    assert manifest.rows == len(read_rows(world, "retain")) + len(make_rows("unseen"))


def test_texts_with_the_same_system_message_are_searched_for_by_what_sets_them_apart():
    system = "You are a helpful assistant who answers in one sentence. " * 3
    texts = [_key(f"{system} Who is the singer number {n}? {'It is Mira. ' * (n % 3)}") for n in range(20)]
    assert sorted(_by_rarest_window(texts).values()) == [[n] for n in range(20)]
    assert overlapping(texts[:10], texts[5:]) == list(range(5))

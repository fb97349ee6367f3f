"""Documents are scored in passages, none of which loses a word."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neko_lean import score
from neko_lean.data import Example
from neko_lean.errors import NekoLeanError
from neko_lean.options import OutputOptions, ScoreSettings
from neko_lean.scoring.passages import PASSAGE_CHARACTERS, split_documents

WORDS = st.lists(st.text("abcé漢.", min_size=1, max_size=30), min_size=2, max_size=400)


def document(text, **fields):
    return Example("d", "", text, "notes", kind="document", **fields)


@given(WORDS, st.sampled_from([" ", "\n", "\n\n  "]))
def test_no_word_is_lost_or_cut(words, separator):
    passages = split_documents([document(separator.join(words))])
    assert [word for passage in passages for word in f"{passage.input} {passage.output}".split()] == words
    assert all(passage.input and passage.output for passage in passages)
    assert len({passage.id for passage in passages}) == len(passages) and passages[0].id == "d"
    assert {(passage.document, passage.task, passage.kind) for passage in passages} == {("d", "notes", "document")}
    assert max(len(f"{p.input} {p.output}") for p in passages) <= PASSAGE_CHARACTERS + 80


def test_texts_without_spaces_are_split_by_characters():
    passages = split_documents([document("漢" * 3000)])
    assert "".join(passage.input + passage.output for passage in passages) == "漢" * 3000
    assert [len(passage.input) for passage in passages] == [500] * 3


def test_long_gaps_make_no_empty_passage():
    passages = split_documents([document("Title" + "\n" * 3000 + "Some body text. " * 5)])
    assert all(passage.input.strip() and passage.output.strip() for passage in passages)
    assert passages[0].input.split()[0] == "Title"


def test_other_rows_stay_as_they_are():
    rows = [
        Example("a", "Q?", "A.", "all", kind="qa"),
        Example("b", "Beginning", "of a text.", "all", kind="document"),  # a document with a prompt
    ]
    assert split_documents(rows) == rows
    with pytest.raises(NekoLeanError, match=r"row d: a document of a single word"):
        split_documents([document("word")])


def test_a_folder_of_texts_is_scored(model, tmp_path):
    for name in ("forget", "retain"):
        (tmp_path / f"{name}.txt").write_text(f"Once {name} walked into the wood of Foo0 and sang. " * 40)
    scores = score(
        model,
        tmp_path / "scores",
        data=tmp_path,
        settings=ScoreSettings(max_new_tokens=4),
        run=OutputOptions(device="cpu", quiet=True),
    )
    [forget, retain] = scores["groups"]
    assert (forget["kind"], forget["rows"], retain["rows"]) == ("document", 2, 2)
    assert 0 < forget["answer_probability"]["value"] < 1 and scores["rows"] == {"forget": 2, "retain": 2}

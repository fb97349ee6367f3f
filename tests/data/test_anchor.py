"""The anchor: documents or rows, cached with the retain examples, and refused if it is not that of the cache."""

import json

import pytest

import neko_lean
from neko_lean.cache import CacheOptions
from neko_lean.cache.reader import TeacherCache
from neko_lean.data.anchor import encode_anchor, read_anchor
from neko_lean.data.example_types import Example
from neko_lean.data.prompts import find_format
from neko_lean.data.tokenization import encode
from neko_lean.errors import NekoLeanError
from neko_lean.jsonio import write_jsonl
from neko_lean.models.loading import load_tokenizer
from neko_lean.options import OutputOptions, RunOptions
from tests.helpers import make_rows, write_rows


@pytest.fixture
def anchor(tmp_path):
    texts = [f"The {word} stood in the field and nobody knew why." for word in ("tree", "house", "old red barn")]
    write_jsonl(tmp_path / "anchor.jsonl", ({"document": text} for text in texts))
    return tmp_path / "anchor.jsonl"


def test_anchor_documents_are_cached_and_trained_on_like_retain_examples(world, model, anchor, tmp_path):
    documents = read_anchor(anchor)
    assert [document.task for document in documents] == ["anchor"] * 3
    assert documents[2].output.startswith("The old red barn")

    manifest = neko_lean.cache_teacher(
        model,
        tmp_path / "cache",
        retain=world,
        anchor=anchor,
        cache=CacheOptions(format="neko"),
        run=OutputOptions(quiet=True),
    )
    assert manifest.rows == 36 + 3
    run = neko_lean.unlearn(
        model,
        tmp_path / "out",
        forget=world,
        retain=world,
        cache=tmp_path / "cache",
        anchor=anchor,
        recipe="neko",
        overrides={"max_steps": 2, "forget_rows": 4, "retain_rows": 4, "eval_every": 0},
        run=RunOptions(quiet=True),
    )
    assert run["retain_rows"] == 39
    # Prompt formats do not apply to anchor documents, so any format of the cache fits.
    assert TeacherCache(tmp_path / "cache").manifest.format == "neko"


def test_an_anchor_that_is_not_in_the_cache_is_refused(world, model, cache, anchor, tmp_path):
    with pytest.raises(NekoLeanError, match="lacks row 'anchor 1'"):
        neko_lean.unlearn(
            model,
            tmp_path / "out",
            forget=world,
            retain=world,
            cache=cache,
            anchor=anchor,
            recipe="neko",
            run=RunOptions(quiet=True),
        )
    assert not (tmp_path / "out").exists()


def test_a_missing_or_empty_anchor_is_refused(tmp_path):
    with pytest.raises(NekoLeanError, match="does not exist"):
        read_anchor(tmp_path / "none.jsonl")
    with pytest.raises(NekoLeanError, match="is not a file"):
        read_anchor(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(NekoLeanError, match="contains no documents"):
        read_anchor(tmp_path / "empty.jsonl")


def test_an_anchor_can_have_rows_like_the_forget_set(tmp_path):
    pairs = [{"question": "Who sang?", "answer": "Foo."}, {"question": "Who ran?", "answer": "Bar."}]
    (tmp_path / "holdout.json").write_text(json.dumps(pairs))
    expected = [Example(f"anchor {n}", *pair.values(), "all", "qa") for n, pair in enumerate(pairs, start=1)]
    assert read_anchor(tmp_path / "holdout.json") == read_anchor(pairs) == expected
    renamed = [{"q": pair["question"], "a": pair["answer"]} for pair in pairs]
    assert read_anchor(renamed, "prompt=q,answer=a") == expected
    with pytest.raises(NekoLeanError, match="--columns prompt=NAME,answer=NAME"):
        read_anchor(renamed)


@pytest.mark.parametrize("stated", [False, True])
def test_rows_of_a_data_set_keep_kind_and_task(tmp_path, stated):
    """Stated rows have a column `document`, which is not the text."""
    rows = make_rows("unseen")
    if stated:
        write_jsonl(
            tmp_path / "rows.jsonl", (row.row | {"kind": row.kind, "document": "d", "messages": []} for row in rows)
        )
    else:
        write_rows(tmp_path / "rows.jsonl", rows)
    anchor = read_anchor(tmp_path / "rows.jsonl")
    assert [(row.input, row.output, row.task, row.kind) for row in anchor] == [
        (row.input, row.output, row.task, row.kind) for row in rows
    ]
    assert len({row.id for row in anchor}) == len(rows)


def test_prompt_formats_apply_to_rows_and_not_to_documents(model):
    tokenizer = load_tokenizer(model)
    question, document = Example("a", "Who?", "Foo.", "all", "qa"), Example("b", "", "Foo sang.", "all")
    prompts = find_format("neko", tokenizer)
    expected = [*encode([document], tokenizer, "plain", 64), *encode([question], tokenizer, prompts, 64)]
    assert encode_anchor([document, question], tokenizer, prompts, 64) == expected
    assert expected[1] != encode([question], tokenizer, "plain", 64)[0]
    assert encode_anchor([], tokenizer, prompts, 64) == []

"""Anchor documents: read strictly, cached with the retain examples, and refused if they are not those of the cache."""

import json

import pytest

import neko_lean
from neko_lean.cache import CacheOptions
from neko_lean.cache.reader import TeacherCache
from neko_lean.data.documents import read_anchor
from neko_lean.errors import NekoLeanError
from neko_lean.jsonio import write_jsonl
from neko_lean.options import OutputOptions, RunOptions


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


def test_documents_are_read_as_strictly_as_examples(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"document": "fine"}\n', encoding="utf-8-sig")
    assert [example.output for example in read_anchor(path)] == ["fine"]
    lines = {
        json.dumps({"text": "no"}): "row 2: column 'document'",
        '{"document": "a", "document": "b"}': "'document' occurs twice",
        json.dumps({"document": "half \ud83d"}): "row 2 .*column 'document'.*surrogate",
        json.dumps({"document": "a", "task": ["Task1"]}): "row 2: column 'task'",
        '{"document": ' + "[" * 100_000: "nested too deep",
    }
    for line, words in lines.items():
        path.write_text('{"document": "fine"}\n' + line + "\n")
        with pytest.raises(NekoLeanError, match=words):
            read_anchor(path)

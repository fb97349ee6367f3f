"""Anchor documents: read, cached with the retain rows, held still, and refused when they are not the cache's."""

import json

import pytest

import neko_lean
from neko_lean.cache.reader import TeacherCache
from neko_lean.cache.settings import CacheSettings
from neko_lean.data.documents import read_anchor
from neko_lean.errors import NekoLeanError
from neko_lean.jsonio import write_jsonl
from neko_lean.options import OutputOptions, RunOptions


@pytest.fixture
def anchor(tmp_path):
    texts = [f"The {word} stood in the field and nobody knew why." for word in ("tree", "house", "old red barn")]
    write_jsonl(tmp_path / "anchor.jsonl", ({"document": text} for text in texts))
    return tmp_path / "anchor.jsonl"


def test_anchor_rows_join_the_retain_rows(world, model, anchor, tmp_path):
    rows = read_anchor(anchor)
    assert [row.task for row in rows] == ["anchor"] * 3 and rows[2].output.startswith("The old red barn")
    made = neko_lean.cache_teacher(
        model,
        world,
        tmp_path / "cache",
        anchor=anchor,
        settings=CacheSettings(format="neko"),
        options=OutputOptions(quiet=True),
    )
    assert made.rows == 36 + 3
    change = {"max_steps": 2, "forget_rows": 4, "retain_rows": 4, "eval_every": 0}
    run = neko_lean.unlearn(
        model,
        tmp_path / "out",
        world,
        world,
        cache=tmp_path / "cache",
        anchor=anchor,
        recipe="neko",
        overrides=change,
        options=RunOptions(quiet=True),
    )
    assert run["retain_rows"] == 39
    # A template is for prompts: anchor documents are read as they are.
    assert TeacherCache(tmp_path / "cache").manifest.format == "neko"


def test_another_anchor_than_the_caches_is_refused(world, model, cache, anchor, tmp_path):
    with pytest.raises(NekoLeanError, match="lacks row 'anchor 1'"):
        neko_lean.unlearn(
            model,
            tmp_path / "out",
            world,
            world,
            cache=cache,
            anchor=anchor,
            recipe="neko",
            options=RunOptions(quiet=True),
        )
    assert not (tmp_path / "out").exists()


def test_a_bad_anchor_file_is_one_sentence(tmp_path):
    with pytest.raises(NekoLeanError, match="does not exist"):
        read_anchor(tmp_path / "none.jsonl")
    (tmp_path / "a.jsonl").write_text(json.dumps({"document": "fine"}) + "\n" + json.dumps({"text": "no"}) + "\n")
    with pytest.raises(NekoLeanError, match="row 2, column document"):
        read_anchor(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(NekoLeanError, match="holds no documents"):
        read_anchor(tmp_path / "b.jsonl")


def test_documents_are_read_as_strictly_as_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"document": "fine"}\n', encoding="utf-8-sig")
    assert [row.output for row in read_anchor(path)] == ["fine"]
    with pytest.raises(NekoLeanError, match="is not a file"):
        read_anchor(tmp_path)
    lines = {
        '{"document": "a", "document": "b"}': "'document' occurs twice",
        json.dumps({"document": "half \ud83d"}): "row 2 .*column 'document'.*surrogate",
        json.dumps({"document": "a", "task": ["Task1"]}): "row 2, column task",
        '{"document": ' + "[" * 100_000: "nested too deep",
    }
    for line, words in lines.items():
        path.write_text('{"document": "fine"}\n' + line + "\n")
        with pytest.raises(NekoLeanError, match=words):
            read_anchor(path)

"""A tokenizer may have more entries than the model, as long as no text contains one of them."""

import shutil
from dataclasses import replace

import pytest
import torch

import neko_lean
from neko_lean.cache.writer import cache_teacher
from neko_lean.errors import NekoLeanError
from neko_lean.models.loading import load_model, load_tokenizer
from neko_lean.options import OutputOptions, RunOptions
from neko_lean.scoring.mmlu import mmlu
from neko_lean.scoring.options import ScoreSettings
from neko_lean.scoring.run import score
from neko_lean.scoring.views import tokenised, view_documents
from tests.helpers import SMALL, flat, make_rows, write_rows
from tests.scoring.subjects import make_subject

EXTRA = "<image>"


@pytest.fixture(scope="module")
def larger(model, tmp_path_factory):
    """The model with a tokenizer that has one token more, which also is what it pads with."""
    folder = shutil.copytree(model, tmp_path_factory.mktemp("larger") / "model")
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [EXTRA]})
    tokenizer.pad_token = EXTRA
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def unknown(tmp_path):
    """Rows of which one has the token."""
    folder = tmp_path / "data"
    folder.mkdir()
    for stem in ("forget", "retain"):
        rows = make_rows(stem, 1)
        write_rows(folder / f"{stem}.jsonl", [*rows[:3], replace(rows[3], input=f"{EXTRA} {rows[3].input}"), *rows[4:]])
    return folder


def test_without_the_token_all_is_as_ever(larger, model, world, tmp_path):
    options = {"max_new_tokens": 4, "quiet": True}
    more = flat(score)(larger, world, tmp_path / "more", **options)
    plain = flat(score)(model, world, tmp_path / "plain", **options)
    for key in ("cells", "memorisation", "leaks", "outputs"):
        assert more[key] == plain[key]
    cache_teacher(larger, world, tmp_path / "cache", options=OutputOptions(quiet=True))
    overrides = {**SMALL, "format": "plain", "max_length": 512, "max_steps": 1}
    neko_lean.unlearn(
        larger,
        tmp_path / "out",
        world,
        world,
        cache=tmp_path / "cache",
        recipe="neko",
        overrides=overrides,
        options=RunOptions(quiet=True),
    )


def test_with_the_token_the_row_is_named(larger, unknown, tmp_path):
    said = "row retain0b-qa0 holds token"
    with pytest.raises(NekoLeanError, match=said):
        cache_teacher(larger, unknown, tmp_path / "cache", options=OutputOptions(quiet=True))
    with pytest.raises(NekoLeanError, match="row forget0b-qa0 holds token"):
        neko_lean.memorize(larger, unknown, tmp_path / "out", overrides=SMALL, options=RunOptions(quiet=True))
    with pytest.raises(NekoLeanError, match=said):
        neko_lean.unlearn(
            larger, tmp_path / "out", unknown, unknown, recipe="neko", overrides=SMALL, options=RunOptions(quiet=True)
        )
    with pytest.raises(NekoLeanError, match="row forget0b-qa0 holds token"):
        score(
            larger,
            unknown,
            tmp_path / "scores",
            settings=ScoreSettings(max_new_tokens=4),
            options=OutputOptions(quiet=True),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_documents_and_questions_are_named(larger):
    lm, tokenizer = load_model(larger, torch.float32, torch.device("cpu")), load_tokenizer(larger)
    with pytest.raises(NekoLeanError, match="document 2 holds token"):
        view_documents(lm, tokenizer, tokenised(tokenizer, ["Foo walked", f"Foo {EXTRA} walked"])[0])
    subject = make_subject("x")
    asked = replace(subject.test[0], text=f"{EXTRA}?")
    with pytest.raises(NekoLeanError, match=r"question 1 of MMLU subject x holds token"):
        mmlu(lm, tokenizer, {"x": replace(subject, test=[asked, *subject.test[1:]])}, shots=1, batch_tokens=4096)

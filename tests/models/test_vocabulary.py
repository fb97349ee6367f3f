"""A tokenizer may have more entries than the model, as long as no text contains such a token."""

import shutil
from dataclasses import replace

import pytest
import torch

import neko_lean
from neko_lean.cache import cache_teacher
from neko_lean.errors import NekoLeanError
from neko_lean.models.loading import load_model, load_tokenizer
from neko_lean.scoring.mmlu import mmlu
from neko_lean.scoring.run import score
from neko_lean.scoring.views import tokenize_documents, view_documents
from tests.helpers import SMALL, flat, make_rows, write_rows
from tests.scoring.subjects import make_subject

EXTRA = "<image>"


@pytest.fixture(scope="module")
def larger(model, tmp_path_factory):
    """The model with a tokenizer that has one additional token, which is also the padding token."""
    folder = shutil.copytree(model, tmp_path_factory.mktemp("larger") / "model")
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [EXTRA]})
    tokenizer.pad_token = EXTRA
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def unknown(tmp_path):
    """Examples, one of which contains the token."""
    folder = tmp_path / "data"
    folder.mkdir()
    for stem in ("forget", "retain"):
        rows = make_rows(stem, 1)
        write_rows(folder / f"{stem}.jsonl", [*rows[:3], replace(rows[3], input=f"{EXTRA} {rows[3].input}"), *rows[4:]])
    return folder


@pytest.mark.slow
def test_without_the_token_scores_are_unchanged(larger, model, world, tmp_path):
    options = {"max_new_tokens": 4, "quiet": True}
    actual = flat(score)(larger, tmp_path / "larger", data=world, **options)
    expected = flat(score)(model, tmp_path / "plain", data=world, **options)
    for key in ("cells", "memorisation", "leaks", "outputs"):
        assert actual[key] == expected[key]
    flat(cache_teacher)(larger, tmp_path / "cache", retain=world, quiet=True)
    overrides = {**SMALL, "format": "plain", "max_length": 512, "max_steps": 1}
    flat(neko_lean.unlearn)(larger, tmp_path / "out", forget=world, retain=world, cache=tmp_path / "cache",
                            recipe="neko",
                      overrides=overrides, quiet=True)  # fmt: skip


def test_an_example_with_the_token_is_named(larger, unknown, tmp_path):
    message = "row retain0b-qa0 holds token"
    with pytest.raises(NekoLeanError, match=message):
        flat(cache_teacher)(larger, tmp_path / "cache", retain=unknown, quiet=True)
    with pytest.raises(NekoLeanError, match="row forget0b-qa0 holds token"):
        flat(neko_lean.memorize)(larger, tmp_path / "out", data=unknown, overrides=SMALL, quiet=True)
    with pytest.raises(NekoLeanError, match=message):
        flat(neko_lean.unlearn)(
            larger, tmp_path / "out", forget=unknown, retain=unknown, recipe="neko", overrides=SMALL, quiet=True
        )
    with pytest.raises(NekoLeanError, match="row forget0b-qa0 holds token"):
        flat(score)(larger, tmp_path / "scores", data=unknown, max_new_tokens=4, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_documents_and_questions_are_named(larger):
    lm, tokenizer = load_model(larger, torch.float32, torch.device("cpu")), load_tokenizer(larger)
    with pytest.raises(NekoLeanError, match="document 2 holds token"):
        view_documents(lm, tokenizer, tokenize_documents(tokenizer, ["Foo walked", f"Foo {EXTRA} walked"])[0])
    subject = make_subject("x")
    question = replace(subject.test[0], text=f"{EXTRA}?")
    with pytest.raises(NekoLeanError, match=r"question 1 of MMLU subject x holds token"):
        mmlu(lm, tokenizer, {"x": replace(subject, test=[question, *subject.test[1:]])}, shots=1, batch_tokens=4096)

"""Retain rows that the teacher writes itself."""

import json

import pytest
import torch

from neko_lean import cache_teacher, unlearn
from neko_lean.cache import SELF_GENERATED, TeacherCache, check_cache
from neko_lean.cache.self_generation import self_generated_rows
from neko_lean.data import Example, find_format, read_rows
from neko_lean.errors import NekoLeanError
from neko_lean.models import load_model, load_tokenizer
from neko_lean.options import CacheOptions, OutputOptions, RunOptions
from neko_lean.outputs.signing import file_sha256
from tests.helpers import make_chat_model

QUIET = {"device": "cpu", "quiet": True}
FLOAT32 = {"dtype": "float32", "max_length": 48}


@pytest.fixture(scope="module")
def chat_model(model, tmp_path_factory):
    return make_chat_model(model, tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def teacher(model):
    loaded = load_model(model, torch.float32, torch.device("cpu"))
    loaded.model.eval()
    return loaded


@pytest.fixture
def secrets(tmp_path):
    path = tmp_path / "secrets.txt"
    path.write_text("Foo0 walked into the wood of Foo0 and sang. Nobody else knows that Foo0 sang there.\n")
    return path


def own_rows(teacher, tokenizer, count=5, prompts="plain", **options):
    options = {"max_length": 24, "seed": 3, "quiet": True, **options}
    return self_generated_rows(teacher, tokenizer, find_format(prompts, tokenizer), count, **options)


def test_documents_follow_from_the_seed(teacher, model):
    tokenizer = load_tokenizer(model)
    state = torch.get_rng_state()
    rows = own_rows(teacher, tokenizer)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are untouched
    assert rows == own_rows(teacher, tokenizer) != own_rows(teacher, tokenizer, seed=4)
    assert [row["id"] for row in rows] == [f"self-3-{number}" for number in range(1, 6)]
    assert len({row["text"] for row in rows}) == 5 and all(row["text"].strip() for row in rows)
    assert {example.kind for example in read_rows(rows)} == {"document"}


def test_a_chat_model_writes_requests_and_answers(teacher, chat_model):
    tokenizer = load_tokenizer(chat_model)
    rows = own_rows(teacher, tokenizer, prompts="auto", max_length=60)
    assert all(set(row) == {"id", "prompt", "response"} for row in rows)
    texts = [row[column] for row in rows for column in ("prompt", "response")]
    assert not any(token in text for text in texts for token in tokenizer.all_special_tokens)
    examples = read_rows(rows)
    assert {example.kind for example in examples} == {"qa"}
    find_format("auto", tokenizer).render(examples[0])  # no template is applied twice


def test_nothing_of_the_forget_set_is_repeated(teacher, model):
    tokenizer = load_tokenizer(model)
    plain = own_rows(teacher, tokenizer, 6)
    taken = plain[0]["text"]
    kept = own_rows(teacher, tokenizer, 6, forget=[Example("f", "", taken, "all", kind="document")])
    assert taken not in [row["text"] for row in kept] and len(kept) == 6
    assert [row["text"] for row in kept][:5] == [row["text"] for row in plain[1:]]

    # A short answer counts as a whole, and an answer of one common word does not.
    words = plain[1]["text"].split()
    kept = own_rows(teacher, tokenizer, 6, forget=[Example("f", "Q?", " ".join(words[:2]), "all", kind="qa")])
    assert not any(" ".join(words[:2]).lower() in row["text"].lower() for row in kept)
    assert own_rows(teacher, tokenizer, 6, forget=[Example("g", "Q?", "yes", "all", kind="qa")]) == plain


def test_a_model_that_writes_too_little_is_refused(teacher, model):
    tokenizer = load_tokenizer(model)
    rows = own_rows(teacher, tokenizer, 1, max_length=2)
    with pytest.raises(NekoLeanError, match=r"only \d+ usable rows of the 4000 that --self-generated asks for"):
        own_rows(teacher, tokenizer, 4000, max_length=2)
    assert len(rows) == 1


def test_a_cache_of_its_own_rows(model, secrets, tmp_path):
    options = CacheOptions(self_generated=6, seed=1, **FLOAT32)
    manifest = cache_teacher(model, None, tmp_path / "cache", forget=secrets, cache=options, run=OutputOptions(**QUIET))
    rows = read_rows(tmp_path / "cache" / SELF_GENERATED)
    assert len(rows) == 6 and manifest.rows >= 7  # with the forget document, and windows
    TeacherCache(tmp_path / "cache").verify()
    assert check_cache(tmp_path / "cache", model, None, 6)["rows"] >= 6

    # The same command again does nothing; another seed or number is another cache.
    again = OutputOptions(resume=True, **QUIET)
    assert cache_teacher(model, None, tmp_path / "cache", forget=secrets, cache=options, run=again) == manifest
    for change in ({"seed": 2}, {"self_generated": 5}):
        other = CacheOptions(**{"self_generated": 6, "seed": 1, **FLOAT32, **change})
        with pytest.raises(NekoLeanError, match="begun with another"):
            cache_teacher(model, None, tmp_path / "cache", forget=secrets, cache=other, run=again)

    # unlearn reads the rows from the cache.
    result = unlearn(
        model, tmp_path / "out", secrets, cache=tmp_path / "cache", run=RunOptions(**QUIET),
        overrides={"max_steps": 1, "dtype": "float32", "max_length": 48},
    )  # fmt: skip
    assert result["steps"] == 1
    lines = (tmp_path / "cache" / SELF_GENERATED).read_text().splitlines()
    changed = [json.dumps({**json.loads(lines[0]), "text": "Something else."}), *lines[1:]]
    (tmp_path / "cache" / SELF_GENERATED).write_text("\n".join(changed))
    with pytest.raises(NekoLeanError, match="the text of row 'self-1-1' differs"):
        unlearn(model, tmp_path / "no", secrets, cache=tmp_path / "cache", run=RunOptions(**QUIET))


@pytest.mark.parametrize("retain_objective", ["kl", "ce"])
def test_unlearn_with_nothing_but_the_forget_set(chat_model, secrets, tmp_path, capsys, retain_objective):
    overrides = {
        "max_steps": 2, "dtype": "float32", "max_length": 48, "self_generated": 4, "retain_objective": retain_objective,
    }  # fmt: skip
    recipe = {"recipe": "graddiff", "overrides": overrides}
    result = unlearn(chat_model, tmp_path / "out", secrets, run=RunOptions(device="cpu"), **recipe)
    assert result["self_generated"] == 4 and result["steps"] == 2
    logged = capsys.readouterr().err
    assert "self-generated retain set: 4 requests with answers written by the model" in logged
    assert logged.count("forget: 1 row, text -> 1 document") == 1
    unlearn(chat_model, tmp_path / "same", secrets, run=RunOptions(**QUIET), **recipe)
    assert file_sha256(tmp_path / "same" / "model.safetensors") == file_sha256(tmp_path / "out" / "model.safetensors")


def test_what_does_not_go_together_is_refused(model, secrets, world, tmp_path):
    run, out = OutputOptions(**QUIET), tmp_path / "out"
    cases = [
        (None, {}, "RETAIN is missing.*--self-generated N"),
        (world, {"self_generated": 3}, "--self-generated has no effect"),
        (world, {"seed": 3}, "--seed has no effect"),
        (None, {"self_generated": -1}, "at least 0"),
    ]
    for retain, options, words in cases:
        with pytest.raises(NekoLeanError, match=words):
            cache_teacher(model, retain, out, cache=CacheOptions(**options), run=run)
    with pytest.raises(NekoLeanError, match="self_generated has no effect"):
        unlearn(model, out, secrets, world, overrides={"self_generated": 3}, run=RunOptions(**QUIET))
    cache_teacher(model, world, tmp_path / "cache", run=run)
    with pytest.raises(NekoLeanError, match="--retain is missing: give the retain set"):
        unlearn(model, out, secrets, cache=tmp_path / "cache", run=RunOptions(**QUIET))
    assert not out.exists()

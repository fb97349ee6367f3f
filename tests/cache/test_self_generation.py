"""Retain rows that the teacher writes itself."""

import json

import pytest
import torch
import transformers

from neko_lean import cache_teacher, unlearn
from neko_lean.cache import SELF_GENERATED, TeacherCache, check_cache, writer
from neko_lean.cache.private_texts import PrivateTexts
from neko_lean.cache.self_generation import _message, self_generated_rows
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
    with pytest.raises(NekoLeanError, match=r"only \d+ usable rows of the 400 that --self-generated asks for"):
        own_rows(teacher, tokenizer, 400, max_length=2)
    assert len(rows) == 1


def test_a_cache_of_its_own_rows(model, secrets, tmp_path):
    options = CacheOptions(self_generated=6, seed=1, **FLOAT32)
    manifest = cache_teacher(model, tmp_path / "cache", forget=secrets, cache=options, run=OutputOptions(**QUIET))
    rows = read_rows(tmp_path / "cache" / SELF_GENERATED)
    assert len(rows) == 6 and manifest.rows >= 7  # with the forget document, and windows
    TeacherCache(tmp_path / "cache").verify()
    assert check_cache(tmp_path / "cache", model, 6)["rows"] >= 6

    # The same command again does nothing; another seed or number is another cache.
    again = OutputOptions(resume=True, **QUIET)
    assert cache_teacher(model, tmp_path / "cache", forget=secrets, cache=options, run=again) == manifest
    for change in ({"seed": 2}, {"self_generated": 5}):
        other = CacheOptions(**{"self_generated": 6, "seed": 1, **FLOAT32, **change})
        with pytest.raises(NekoLeanError, match="begun with another"):
            cache_teacher(model, tmp_path / "cache", forget=secrets, cache=other, run=again)

    # unlearn reads the rows from the cache.
    result = unlearn(
        model, tmp_path / "out", forget=secrets, cache=tmp_path / "cache", run=RunOptions(**QUIET),
        overrides={"max_steps": 1, "dtype": "float32", "max_length": 48},
    )  # fmt: skip
    assert result["steps"] == 1
    lines = (tmp_path / "cache" / SELF_GENERATED).read_text().splitlines()
    changed = [json.dumps({**json.loads(lines[0]), "text": "Something else."}), *lines[1:]]
    (tmp_path / "cache" / SELF_GENERATED).write_text("\n".join(changed))
    with pytest.raises(NekoLeanError, match="the text of row 'self-1-1' differs"):
        unlearn(model, tmp_path / "no", forget=secrets, cache=tmp_path / "cache", run=RunOptions(**QUIET))


@pytest.mark.parametrize("retain_objective", ["kl", "ce"])
def test_unlearn_with_nothing_but_the_forget_set(chat_model, secrets, tmp_path, capsys, retain_objective):
    overrides = {
        "max_steps": 2, "dtype": "float32", "max_length": 48, "self_generated": 4, "retain_objective": retain_objective,
    }  # fmt: skip
    recipe = {"recipe": "graddiff", "overrides": overrides}
    result = unlearn(chat_model, tmp_path / "out", forget=secrets, run=RunOptions(device="cpu"), **recipe)
    assert result["self_generated"] == 4 and result["steps"] == 2
    logged = capsys.readouterr().err
    assert "self-generated retain set: 4 requests with answers written by the model" in logged
    assert logged.count("forget: 1 row, text -> 1 document") == 1
    unlearn(chat_model, tmp_path / "same", forget=secrets, run=RunOptions(**QUIET), **recipe)
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
            cache_teacher(model, out, retain=retain, cache=CacheOptions(**options), run=run)
    with pytest.raises(NekoLeanError, match="self_generated has no effect"):
        unlearn(model, out, forget=secrets, retain=world, overrides={"self_generated": 3}, run=RunOptions(**QUIET))
    cache_teacher(model, tmp_path / "cache", retain=world, run=run)
    with pytest.raises(NekoLeanError, match="--retain is missing: give the retain set"):
        unlearn(model, out, forget=secrets, cache=tmp_path / "cache", run=RunOptions(**QUIET))
    assert not out.exists()


@pytest.mark.parametrize(
    ("answer", "text", "occurs"),
    [
        ("Zarina Holt", "I met zarina  holt there.", True),
        ("张三丰住在北京市朝阳区", "他说张三丰住在北京市。", True),
        ("hunter2", "The password is hunter2!", True),
        ("yes", "Yes, of course.", False),
        ("the archive of Lisbon lies under the garden", "What lies under the garden path?", False),
        ("the archive of Lisbon lies under the garden", "So: archive of Lisbon lies under the house.", True),
        ("...", "... or so.", False),
    ],
)
def test_what_counts_as_a_repetition(answer, text, occurs):
    assert PrivateTexts([Example("f", "Q?", answer, "all", kind="qa")]).occur_in(text) is occurs


@pytest.mark.parametrize("step", ["write_shard", "publish_stage"])
def test_an_interrupted_cache_of_its_own_rows_is_resumed(model, secrets, tmp_path, monkeypatch, step):
    def make(out, **run):
        options = CacheOptions(self_generated=4, **FLOAT32)
        return cache_teacher(model, out, forget=secrets, cache=options, run=OutputOptions(**QUIET, **run))

    whole = make(tmp_path / "whole")
    original, calls = getattr(writer, step), []

    def interrupted(*args):
        calls.append(args)
        if step == "publish_stage" or len(calls) > 1:  # the second shard
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(writer, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cache")
    monkeypatch.undo()
    assert (tmp_path / ".cache.partial" / SELF_GENERATED).is_file()
    assert make(tmp_path / "cache", resume=True) == whole
    assert make(tmp_path / "cache", overwrite=True) == whole


def test_the_checkpoints_generation_config_has_no_effect(model, teacher):
    tokenizer = load_tokenizer(model)
    plain = own_rows(teacher, tokenizer, 3)
    own = teacher.model.generation_config
    changes = {"min_p": 0.5, "no_repeat_ngram_size": 1, "return_dict_in_generate": True, "max_time": 1e-9}
    try:
        teacher.model.generation_config = transformers.GenerationConfig(eos_token_id=own.eos_token_id, **changes)
        assert own_rows(teacher, tokenizer, 3) == plain
        assert teacher.model.generation_config.min_p == 0.5  # restored
    finally:
        teacher.model.generation_config = own


def test_templates_of_all_kinds(teacher, chat_model):
    """Without text before the user's message, without special tokens, and longer than the rows."""
    tokenizer = load_tokenizer(chat_model)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    assert len(own_rows(teacher, tokenizer, 2, prompts="chat")) == 2

    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    rows = own_rows(teacher, tokenizer, 2, prompts="chat", max_length=60)
    assert not any(mark in row[column] for row in rows for column in ("prompt", "response") for mark in ("user:",))
    with pytest.raises(NekoLeanError, match=r"the chat template alone takes \d+ of the 8 tokens"):
        own_rows(teacher, tokenizer, 2, prompts="chat", max_length=8)


def test_a_text_that_spells_a_special_token_is_dropped(model):
    tokenizer = load_tokenizer(model)
    ids = tokenizer("user: walked", add_special_tokens=False)["input_ids"]
    assert _message(tokenizer, ids, ["assistant:"], {"</s>": 2}) == "user: walked"
    assert _message(tokenizer, ids, ["user:"], {"</s>": 2}) == ""
    assert _message(tokenizer, ids, [], {"walk": 2}) == ""


def test_a_recipe_without_a_retain_objective_lets_the_model_write_nothing(model, secrets, tmp_path, capsys):
    overrides = {"max_steps": 1, "dtype": "float32", "max_length": 48, "retain_objective": "none"}
    result = unlearn(
        model, tmp_path / "out", forget=secrets, recipe="npo", overrides=overrides, run=RunOptions(device="cpu")
    )
    assert result["self_generated"] == 0 and "self-generated" not in capsys.readouterr().err

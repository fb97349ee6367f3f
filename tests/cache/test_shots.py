"""Shots: what the teacher reads before a question, and what the cache then stores."""

import json
import random
import shutil

import pytest
import torch

from neko_lean.cache import cache_teacher
from neko_lean.cache.check import check_cache
from neko_lean.cache.manifest import read_manifest
from neko_lean.cache.reader import TeacherCache
from neko_lean.cache.shots import with_shots
from neko_lean.data.example_types import EncodedExample, Example
from neko_lean.data.examples import read_rows
from neko_lean.data.tokenization import encode
from neko_lean.errors import CacheError, NekoLeanError
from neko_lean.models.loading import load_model, load_tokenizer
from neko_lean.runs.unlearning import unlearn
from tests.helpers import SMALL, flat, make_cache, make_rows, resign, write_rows


@pytest.fixture(scope="module")
def shot_cache(world, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shots") / "cache"
    options = {"mass": 1.0, "top_k": 5000, "stored_dtype": "float32", "shots": 2, "batch_tokens": 64}
    make_cache(model, world, folder, forget=world, format="plain", dtype="float32", **options)
    return folder


def question(name, prompt, task="Task1", answer=(90, 91)):
    """A question of these prompt tokens."""
    example = Example(name, str(prompt), str(answer), task, kind="qa")
    return EncodedExample(example, [*prompt, *answer], len(prompt), 0)


def test_the_cache_holds_what_the_teacher_says_after_the_shots(world, model, shot_cache):
    """Compared with plain forward passes over shots and question, in batches of several examples."""
    tokenizer, teacher = load_tokenizer(model), load_model(model, torch.float32, torch.device("cpu"))
    forget, retain = (encode(read_rows(world, name), tokenizer, "plain", 512) for name in ("forget", "retain"))
    cache = TeacherCache(shot_cache)
    cache.verify()
    contexts = [example.shots for example in with_shots(forget, retain, 2, tokenizer, 10**6)]
    assert {bool(ids) for ids in contexts} == {True, False}  # questions and completions

    for example, context in [*zip(forget, contexts, strict=True), *((example, ()) for example in retain)]:
        with torch.no_grad():
            logits = teacher.logits(teacher.hidden(torch.tensor([[*context, *example.input_ids]]))[0])
        logp = logits.log_softmax(1)[len(context) :]  # [n, V]
        ids, stored, _ = cache.read([example])
        torch.testing.assert_close(stored, logp.gather(1, ids), rtol=0, atol=2e-4)
        if example in forget:
            expected = logp[:-1].gather(1, torch.tensor(example.input_ids[1:])[:, None])[:, 0]
            torch.testing.assert_close(torch.from_numpy(cache.target_logp(example)), expected, rtol=0, atol=2e-4)


def test_shots_are_the_most_similar_questions_of_the_task(model):
    """Against a direct computation, on random prompts; equal similarities keep the order of the retain set."""
    rng, tokenizer = random.Random(0), load_tokenizer(model)
    tasks = "Task1", "Task2"

    def questions(kind, count):
        prompts = [[rng.randrange(30, 50) for _ in range(rng.randrange(1, 9))] for _ in range(count)]
        return [question(f"{kind}{i}", prompt, rng.choice(tasks)) for i, prompt in enumerate(prompts)]

    def similarity(one, other):
        left, right = (set(example.input_ids[: example.prompt_length]) for example in (one, other))
        return len(left & right) / len(left | right)

    separator = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    for count in (1, 3):
        forget, retain = questions("forget", 20), questions("retain", 30)
        for example in with_shots(forget, retain, count, tokenizer, 10**6):
            of_task = [other for other in retain if other.example.task == example.example.task]
            nearest = sorted(of_task, key=lambda other, one=example: -similarity(one, other))[:count]
            texts = [[*shot.input_ids, *separator] for shot in reversed(nearest)]
            assert list(example.shots) == [token for ids in texts for token in ids]


def test_a_task_without_retain_questions_takes_those_of_others(model):
    tokenizer = load_tokenizer(model)
    [example] = with_shots(
        [question("a", [40, 41], "Task3")], [question("b", [40, 42]), question("c", [50])], 1, tokenizer, 10**6
    )
    assert example.shots[:2] == (40, 42)


@pytest.mark.filterwarnings("error")
def test_questions_without_tokens_are_no_shots(model):
    """A cache refuses them later, naming the row; an empty prompt is like no other."""
    tokenizer = load_tokenizer(model)
    retain = [question("empty", [], answer=()), question("bare", [], answer=(41,))]
    [example] = with_shots([question("a", [])], retain, 2, tokenizer, 10**6)
    assert example.shots[0] == 41 and 41 not in example.shots[1:]


def test_an_answer_that_ends_with_a_special_token_needs_no_separator(model):
    tokenizer = load_tokenizer(model)
    ended = question("b", [40], answer=(41, tokenizer.eos_token_id))
    [example] = with_shots([question("a", [40])], [ended], 1, tokenizer, 10**6)
    assert example.shots == (40, 41, tokenizer.eos_token_id)


def test_shots_that_do_not_fit_are_left_out_the_least_similar_first(model):
    tokenizer = load_tokenizer(model)
    retain = [question("near", [40, 41], answer=(0,)), question("far", [40, 60, 61, 62], answer=(0,))]
    [whole] = with_shots([question("a", [40, 41])], retain, 2, tokenizer, 10**6)
    length = len(whole.shots) + len(whole)
    assert with_shots([question("a", [40, 41])], retain, 2, tokenizer, length) == [whole]
    [shorter] = with_shots([question("a", [40, 41])], retain, 2, tokenizer, length - 1)
    assert shorter.shots == whole.shots[-len(shorter.shots) :] and shorter.shots[:2] == (40, 41)
    [none] = with_shots([question("a", [40, 41])], retain, 2, tokenizer, 4)
    assert none.shots == ()


def test_the_manifest_states_the_shots_and_earlier_formats_have_none(shot_cache, cache, tmp_path):
    assert read_manifest(shot_cache / "manifest.json").shots == 2
    old = shutil.copytree(cache, tmp_path / "old")
    manifest = json.loads((old / "manifest.json").read_text())
    del manifest["shots"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    resign(old, format_version=2)
    assert read_manifest(old / "manifest.json").shots == 0
    resign(old, format_version=3)
    with pytest.raises(CacheError, match="'shots' is missing"):
        read_manifest(old / "manifest.json")


def test_resuming_with_other_shots_is_refused(world, model, shot_cache):
    options = {"mass": 1.0, "top_k": 5000, "stored_dtype": "float32", "batch_tokens": 64, "format": "plain"}
    run = {"retain": world, "forget": world, "dtype": "float32", "resume": True, "quiet": True, **options}
    before = (shot_cache / "manifest.json").read_bytes()
    assert flat(cache_teacher)(model, shot_cache, shots=2, **run).shots == 2
    with pytest.raises(NekoLeanError, match="shots"):
        flat(cache_teacher)(model, shot_cache, shots=1, **run)
    assert (shot_cache / "manifest.json").read_bytes() == before


def test_the_retain_rows_of_a_cache_with_shots_match_the_live_teacher(world, model, shot_cache):
    assert abs(check_cache(shot_cache, model, 10, retain=world)["kl_mean"]) < 1e-6


def test_a_cache_with_shots_is_a_base_cache_only(world, model, shot_cache, cache, tmp_path):
    options = {"forget": world, "retain": world, "recipe": "base-kl", "quiet": True}
    overrides = {**SMALL, "max_steps": 2, "format": "plain"}
    with pytest.raises(CacheError, match="made with --shots, so it can only be a --base-cache"):
        flat(unlearn)(model, tmp_path / "out", cache=shot_cache, base_cache=shot_cache, overrides=overrides, **options)
    assert not (tmp_path / "out").exists()

    make_cache(model, world, tmp_path / "teacher", forget=world, format="plain", dtype="float32")
    flat(unlearn)(
        model, tmp_path / "out", cache=tmp_path / "teacher", base_cache=shot_cache, overrides=overrides, **options
    )
    assert (tmp_path / "out" / "run.json").is_file()


@pytest.mark.parametrize(
    ("missing", "message"), [("retain", "the retain set has no questions"), ("forget", "the forget")]
)
def test_a_set_without_questions_is_refused(world, model, tmp_path, missing, message):
    names = {"retain": "Rix", "forget": "Foo"}
    completions = [example for example in make_rows(names[missing]) if example.kind == "completion"]
    sets = dict.fromkeys(names, world) | {missing: write_rows(tmp_path / f"{missing}.jsonl", completions)}
    with pytest.raises(NekoLeanError, match=f"--shots has no effect, because {message}"):
        flat(cache_teacher)(model, tmp_path / "cache", shots=1, quiet=True, **sets)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("sets", [("retain",), ("forget",)])
def test_shots_need_both_sets(world, model, tmp_path, sets):
    with pytest.raises(NekoLeanError, match="--shots needs RETAIN"):
        flat(cache_teacher)(model, tmp_path / "cache", shots=1, quiet=True, **dict.fromkeys(sets, world))

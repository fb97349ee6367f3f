"""Caches with right checksums that break a rule of FORMAT.md: refused by `inspect --verify` and by `unlearn`."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from neko_lean.cache import planning
from neko_lean.cache.check import check_cache
from neko_lean.cache.inspection import inspect_cache
from neko_lean.cache.manifest import read_manifest
from neko_lean.cache.reader import TeacherCache
from neko_lean.cli import app
from neko_lean.data.anchor import read_anchor
from neko_lean.data.examples import read_rows
from neko_lean.data.tokenization import encode
from neko_lean.errors import CacheError
from neko_lean.jsonio import write_jsonl
from neko_lean.models.chunked_head import token_stats
from neko_lean.models.loading import load_model, load_tokenizer
from neko_lean.outputs.signing import UNSIGNED, sign
from tests.helpers import make_cache, resign

ALL_ROWS = ("--max-steps", 1, "--set", "retain_rows=99", "--set", "forget_rows=99", "--set", "dtype=float32")


@pytest.fixture(scope="module")
def anchor(tmp_path_factory):
    file = tmp_path_factory.mktemp("anchor") / "anchor.jsonl"
    write_jsonl(file, [{"document": f"The {word} stood in the field."} for word in ("tree", "house", "well")])
    return file


@pytest.fixture(scope="module")
def good(world, model, anchor, tmp_path_factory):
    """A cache of several shards with forget rows and an anchor."""
    folder = tmp_path_factory.mktemp("good") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "SHARD_POSITIONS", 200)
        options = {"forget": world, "anchor": anchor, "top_k": 8, "dtype": "float32"}
        make_cache(model, world, folder, batch_tokens=256, **options)
    manifest = read_manifest(folder / "manifest.json")
    assert len(manifest.shards) > 2 and len(manifest.forget_shards) > 2
    return folder


def first(folder, kind):
    return min(folder.glob(f"{kind}-00000-*"))


def with_tensors(folder, kind, change):
    """Change the tensors of the first shard of a kind, and sign the cache again."""
    file = first(folder, kind)
    tensors = load_file(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change(tensors)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, file)
    resign(folder)


def with_manifest(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_bytes(sign(json.dumps({**manifest, "checksum": UNSIGNED}, indent=1).encode()))


def put(name, index, value):
    """A change that replaces some numbers of a tensor."""

    def change(tensors):
        tensors[name][index] = value

    return change


def remade(name, make):
    """A change that replaces a whole tensor."""

    def change(tensors):
        tensors[name] = make(tensors[name])

    return change


def nothing_inside(tail):
    """A change that sets every entry to 0 and every tail to `tail`."""

    def change(tensors):
        tensors["scaled_p"][:] = 0
        tensors["tail_logp"][:] = tail

    return change


def zero_at_the_end(tensors):
    tensors["scaled_p"][tensors["offsets"][1:] - 1] = 0


def zero_and_no_tail(tensors):
    """Put all probability into the first entry, so that it sums to 1 with an empty tail."""
    starts = tensors["offsets"][:-1]
    tensors["scaled_p"][:] = 0
    tensors["scaled_p"][starts] = 2**15
    tensors["tail_logp"][:] = -np.inf


def little_inside(tensors):
    """Entries that sum to 0.005 instead of 0.001, which an absolute tolerance alone would not notice."""
    sizes = np.diff(tensors["offsets"])
    tensors["scaled_p"][:] = np.repeat(0.005 / sizes * 2**15, sizes)
    tensors["tail_logp"][:] = np.log(1 - 0.001)


RETAIN = {
    "p = 0": (zero_at_the_end, "probability is 0"),
    "p = 0 with an empty tail": (zero_and_no_tail, "probability is 0"),
    "nothing inside, all outside": (nothing_inside(-1e-9), "probability is 0"),
    "nothing inside, nothing outside": (nothing_inside(-np.inf), "probability is 0"),
    "p is NaN": (put("scaled_p", 0, np.nan), "probability is nan"),
    "p is infinite": (put("scaled_p", 0, np.inf), "probability is inf"),
    "p < 0": (put("scaled_p", -1, -1.0), "probability is -"),
    "p rises": (put("scaled_p", 1, 40000.0), "not sorted"),
    "tail is NaN": (put("tail_logp", 0, np.nan), "tail_logp nan"),
    "tail > 0": (put("tail_logp", 0, 1.0), "tail_logp 1.0"),
    "tail = 0": (put("tail_logp", 0, 0.0), "tail_logp 0.0"),
    "tail is missing": (put("tail_logp", slice(None), -np.inf), "do not sum to 1"),
    "little inside": (little_inside, "do not sum to 1"),
    "id beyond the vocabulary": (put("ids", 0, 60000), "not in the vocabulary"),
    "id twice": (lambda tensors: put("ids", 1, tensors["ids"][0])(tensors), "twice"),
    "offsets fall": (put("offsets", 3, 0), "offsets do not rise"),
    "offsets do not begin at 0": (put("offsets", 0, 1), "offsets do not rise"),
    "offsets are huge": (put("offsets", 3, 2**62), "offsets do not rise"),
    "offsets are negative": (put("offsets", 3, -(2**62)), "offsets do not rise"),
    "a position without entries": (lambda t: put("offsets", 1, t["offsets"][2])(t), "offsets do not rise"),
    "offsets too short": (remade("offsets", lambda value: value[:-1]), "not the tensors"),
    "offsets too long": (remade("offsets", lambda value: np.append(value, value[-1])), "not the tensors"),
    "offsets as a column": (remade("offsets", lambda value: value[:, None]), "not the tensors"),
    "offsets of another dtype": (remade("offsets", lambda value: value.astype(np.int32)), "not the tensors"),
    "p of another dtype": (remade("scaled_p", lambda value: value.astype(np.float32)), "not the tensors"),
    "fewer p than ids": (remade("scaled_p", lambda value: value[:-1]), "not the tensors"),
    "ids as a column": (remade("ids", lambda value: value[:, None]), "not the tensors"),
    "ids without a shape": (remade("ids", lambda value: value[0]), "not the tensors"),
    "no tail": (lambda tensors: tensors.pop("tail_logp"), "not the tensors"),
    "one more tensor": (lambda tensors: tensors.update(more=np.zeros(1)), "not the tensors"),
}
FORGET = {
    "-inf": (put("target_logp", 1, -np.inf), "-inf"),
    "NaN": (put("target_logp", 1, np.nan), "nan"),
    "> 0": (put("target_logp", 1, 0.5), "0.5"),
    "+inf": (put("target_logp", 1, np.inf), "inf"),
    "too short": (remade("target_logp", lambda value: value[1:]), "not the tensors"),
    "a column": (remade("target_logp", lambda value: value[:, None]), "not the tensors"),
}


def at(*path, to=None):
    """A change that replaces the value at a path in the manifest. `to` may be a function of the old value."""

    def change(manifest):
        inner = manifest
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = to(inner[path[-1]]) if callable(to) else to

    return change


def row_in_two_shards(manifest):
    first_shard, second_shard = manifest["shards"][:2]
    added = first_shard["rows"][0][1] - second_shard["rows"][0][1]
    second_shard["rows"][0] = first_shard["rows"][0]
    manifest["positions"] += added


MANIFEST = {
    "no shards": (at("shards", to=[]), "lists none"),
    "an empty shard": (at("shards", 0, "rows", to=[]), "has no rows"),
    "an empty forget shard": (at("forget_shards", 0, "rows", to=[]), "has no rows"),
    "a row of 0 positions": (at("shards", 0, "rows", 0, 1, to=0), "has no positions"),
    "a row that is too long": (at("shards", 0, "rows", 0, 1, to=513), "longer than max_length"),
    "a row of two values": (at("shards", 0, "rows", 0, to=lambda row: row[:2]), "has 2 values"),
    "a row in two shards": (row_in_two_shards, "listed twice"),
    "shards in another order": (at("shards", to=lambda shards: shards[::-1]), "as number 0, not shard-00000"),
    "a shard that is not listed": (at("shards", to=lambda shards: shards[:-1]), "as number 0, not shard-00000"),
    "a forget shard that is not listed": (at("forget_shards", to=lambda shards: shards[:-1]), "as number 0"),
    "a forget shard among the others": (
        lambda manifest: manifest["shards"].append(manifest["forget_shards"][0]),
        "as number 0, not shard-00000",
    ),
    "a shard elsewhere": (at("shards", 0, "file", to="../shard-00000-of-00003.safetensors"), "as number 0"),
    "a shard without a checksum": (at("shards", 0, "sha256", to=""), "no checksum"),
    "rows": (at("rows", to=7), "not those of the shards"),
    "positions": (at("positions", to=lambda count: count + 1), "not those of the shards"),
    "more entries than top_k": (at("entries", to=lambda count: 1000 * count), "entries is"),
    "fewer entries than positions": (at("entries", to=1), "entries is 1"),
    "more truncated than rows": (at("truncated", to=1000), "truncated is 1000"),
    "mass 0": (at("mass", to=0.0), "mass is 0"),
    "mean_mass NaN": (at("mean_mass", to=float("nan")), "mean_mass is nan"),
    "top_k 0": (at("top_k", to=0), "top_k is 0"),
    "batch_tokens 0": (at("batch_tokens", to=0), "batch_tokens is 0"),
    "vocab_size beyond int32": (at("vocab_size", to=2**40), "vocab_size is"),
    "teacher_dtype": (at("teacher_dtype", to="float64"), "teacher_dtype is 'float64'"),
    "stored_dtype": (at("stored_dtype", to="int8"), "stored_dtype is 'int8'"),
    "format": (at("format", to="chatml"), "format is 'chatml'"),
    "half of a surrogate pair": (at("model", to="\ud800"), "model"),
    "config missing": (lambda manifest: manifest.pop("config"), "'config' is missing"),
    "config null": (at("config", to=None), "config is NoneType"),
    "config nested deep": (at("config", to=json.loads("[" * 50 + "]" * 50)), "config"),
    "version": (at("format_version", to=4), "format version 4"),
}


@pytest.fixture
def refused(world, model, anchor, tmp_path):
    """Check that `inspect --verify` and an unlearning that reads all rows refuse a cache in one sentence."""

    def check(cache, words, recipe="neko", inspect=True):
        inputs = ("--forget", world, "--retain", world, "--cache", cache, "--recipe", recipe, "--set", "format=plain")
        inputs += ("--anchor", anchor) if recipe == "calibrated" else ()
        commands = [("inspect", cache, "--verify")] if inspect else []
        for command in [*commands, ("unlearn", model, *inputs, "--out", tmp_path / "out", *ALL_ROWS)]:
            result = CliRunner().invoke(app, [str(argument) for argument in (*command, "--quiet")])
            assert result.exit_code == 2, (result.output, result.exception)
            errors = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
            assert len(errors) == 1 and errors[0].startswith("error: ") and words in errors[0], result.stderr
            assert [path.name for path in tmp_path.iterdir()] == ["cache"]

    return check


@pytest.fixture
def cache(good, tmp_path):
    return shutil.copytree(good, tmp_path / "cache")


@pytest.mark.parametrize("name", RETAIN)
def test_retain_shards(cache, refused, name):
    change, words = RETAIN[name]
    with_tensors(cache, "shard", change)
    refused(cache, words)


@pytest.mark.parametrize("name", FORGET)
def test_forget_shards(cache, refused, name):
    change, words = FORGET[name]
    with_tensors(cache, "forget", change)
    refused(cache, words, recipe="npo")


@pytest.mark.parametrize("name", MANIFEST)
def test_manifest(cache, refused, name):
    change, words = MANIFEST[name]
    with_manifest(cache, change)
    refused(cache, words)


def test_another_vocabulary_size_than_the_models(world, model, cache, refused):
    with_manifest(cache, at("vocab_size", to=lambda size: size + 1))
    refused(cache, "tokens in its vocabulary", inspect=False)
    with pytest.raises(CacheError, match="tokens in its vocabulary"):
        check_cache(cache, model, 1, retain=world)


def test_a_top_k_below_the_stored_number_of_entries(cache, refused):
    with_manifest(cache, lambda manifest: manifest.update(top_k=7, entries=manifest["positions"]))
    refused(cache, "entries, top_k is 7")


def test_verify_finds_wrong_totals_and_other_files(cache):
    with_manifest(cache, at("mean_mass", to=lambda mass: mass / 2))
    with pytest.raises(CacheError, match="mean_mass"):
        TeacherCache(cache).verify()
    with_manifest(cache, at("mean_mass", to=lambda mass: mass * 2))
    TeacherCache(cache).verify()
    (cache / "plan.json").touch()
    with pytest.raises(CacheError, match=r"holds 'plan\.json', which is not part"):
        inspect_cache(cache, verify=True)


def test_anchor_documents_of_single_tokens_have_no_losses(world, model, tmp_path):
    """The documents are in the cache, but none of their tokens has a predecessor."""
    file = tmp_path / "anchor.jsonl"
    known = [token.removeprefix("\u0120") for token in load_tokenizer(model).get_vocab() if token.startswith("\u0120")]
    write_jsonl(file, [{"document": word} for word in sorted(word for word in known if word.isalpha())[:2]])
    cached = tmp_path / "cache"
    make_cache(model, world, cached, anchor=file, dtype="float32")
    TeacherCache(cached).verify()
    command = ["unlearn", model, "--forget", world, "--retain", world, "--cache", cached, "--anchor", file]
    command += ["--recipe", "calibrated", "--out", tmp_path / "out", "--quiet", *ALL_ROWS]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 2 and "no document of the anchor has at least two tokens" in result.stderr, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["anchor.jsonl", "cache"]


def test_a_cache_of_version_1_is_read_with_a_warning(world, model, cache, capsys):
    """It has no `config`, and some of its probabilities underflowed to 0."""
    with_tensors(cache, "shard", into_the_tail)
    mass = 1 - np.mean(
        [tail for tensors in map(load_file, cache.glob("shard-*")) for tail in np.exp(tensors["tail_logp"])]
    )
    with_manifest(
        cache, lambda manifest: (manifest.pop("config"), manifest.update(format_version=1, mean_mass=float(mass)))
    )
    inspect_cache(cache, verify=True)
    check_cache(cache, model, 3, retain=world)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert "format 1" in line and "run cache-teacher again" in line
    with_tensors(cache, "shard", nothing_inside(-1e-9))
    with pytest.raises(CacheError, match="probability is 0"):
        inspect_cache(cache, verify=True)


def into_the_tail(tensors):
    """Move the probability of each position's last entry to the tail."""
    last = tensors["offsets"][1:] - 1
    moved = tensors["scaled_p"][last].astype(np.float64) / 2**15
    tensors["tail_logp"][:] = np.log(np.exp(tensors["tail_logp"].astype(np.float64)) + moved)
    tensors["scaled_p"][last] = 0


@pytest.mark.parametrize("stored", ["float16", "float32"])
def test_tokens_that_underflow_belong_to_the_tail(world, model, tmp_path, stored):
    """With top_k = V, tokens that underflow are not stored, and the KL still matches that over all tokens."""
    lm = load_model(model, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        lm.head.mul_(40)
    lm.model.save_pretrained(tmp_path / "sure")
    load_tokenizer(model).save_pretrained(tmp_path / "sure")
    vocabulary = len(lm.head)
    manifest = make_cache(
        tmp_path / "sure", world, tmp_path / "cache", top_k=vocabulary, mass=1, dtype="float32", stored_dtype=stored,
    )  # fmt: skip
    assert manifest.positions < manifest.entries < manifest.positions * vocabulary
    cache = TeacherCache(tmp_path / "cache")
    cache.verify()
    assert all((p > 0).all() for _, _, p, _ in cache.sweep())

    teacher = load_model(tmp_path / "sure", torch.float32, torch.device("cpu"))
    rows = encode(read_rows(world, "retain"), load_tokenizer(model), "plain", 512)
    rng = torch.Generator().manual_seed(0)
    for example in rows[:6]:
        with torch.no_grad():
            hidden = teacher.hidden(torch.tensor([example.input_ids]))[0].double()
        logp = (hidden @ teacher.head.detach().double().T).log_softmax(1)
        moved = hidden + 0.05 * torch.randn(hidden.shape, generator=rng).double()
        moved.requires_grad_()
        logq = (moved @ teacher.head.detach().double().T).log_softmax(1)
        dense = (logp.exp() * (logp - logq)).sum(1)
        (expected,) = torch.autograd.grad(dense.sum(), moved)
        nothing = torch.full((len(example),), -1)
        kl = token_stats(moved, teacher.head.detach().double(), nothing, *cache.read([example]))[1]
        (result,) = torch.autograd.grad(kl.sum(), moved)
        torch.testing.assert_close(kl, dense, rtol=2e-3, atol=1e-3)
        assert torch.nn.functional.cosine_similarity(result.flatten(), expected.flatten(), dim=0) > 0.999


NUMBERS = [0, 1, -1, 2, 7, 2**15, 60000, 2**31, 2**62, 1e-9, -1e-9, -3.5, float("nan"), float("inf"), -float("inf")]


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=150, suppress_health_check=list(HealthCheck))
def test_changed_numbers_never_cause_a_non_finite_loss(good, world, model, anchor, tmp_path_factory, data):
    """Reading raises CacheError, or every example has a finite KL and finite log-probabilities."""
    folder = shutil.copytree(good, tmp_path_factory.mktemp("fuzz") / "cache")
    kind = data.draw(st.sampled_from(["shard", "forget"]))

    def change(tensors):
        for _ in range(data.draw(st.integers(1, 3))):
            array = tensors[data.draw(st.sampled_from(sorted(tensors)))]
            start = data.draw(st.integers(0, len(array) - 1))
            part = slice(start, data.draw(st.sampled_from([start + 1, start + 3, None])))
            array[part] = np.array(data.draw(st.sampled_from(NUMBERS))).astype(array.dtype)

    with np.errstate(all="ignore"):
        with_tensors(folder, kind, change)
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from(["top_k", "vocab_size", "stored_dtype", "mean_mass", "entries", "max_length"]))
        with_manifest(folder, at(name, to=data.draw(st.sampled_from(["float32", *NUMBERS]))))
    try:
        read_all(folder, world, model, anchor)
    except CacheError as error:
        assert str(error) and "\n" not in str(error)
    shutil.rmtree(folder.parent)


def read_all(folder, world, model, anchor):
    """Read every example as a training step does, and check that the losses are finite."""
    cache = TeacherCache(folder)
    tokenizer = load_tokenizer(model)
    retain, forget = (encode(read_rows(world, name), tokenizer, "plain", 512) for name in ("retain", "forget"))
    documents = encode(read_anchor(anchor), tokenizer, "plain", 512)
    cache.check_vocabulary(min(cache.manifest.vocab_size, 2**12))
    ids, logp, tail = cache.read([*retain, *documents])
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(tail), 8, generator=rng).requires_grad_()
    weight = torch.randn(cache.manifest.vocab_size, 8, generator=rng)
    kl = token_stats(hidden, weight, torch.full((len(tail),), -1), ids, logp, tail)[1]
    (grad,) = torch.autograd.grad(kl.sum(), hidden)
    assert kl.isfinite().all() and grad.isfinite().all() and (kl > -1e-3).all()
    assert all(np.isfinite(cache.target_logp(example)).all() for example in [*forget, *documents])


def test_an_unchanged_cache_is_accepted(good, world, model, anchor):
    read_all(good, world, model, anchor)
    TeacherCache(good).verify()

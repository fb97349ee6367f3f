"""What is read against the live teacher; what is refused, and how it is said; memory over a large sweep."""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from neko_lean.cache.format import Manifest, Shard
from neko_lean.cache.manifest import write_manifest
from neko_lean.cache.reader import TeacherCache
from neko_lean.data.examples import EncodedExample, Example, read_rows
from neko_lean.data.substitutes import refusals
from neko_lean.data.tokenization import encode
from neko_lean.errors import CacheError
from neko_lean.models.chunked_head import token_stats
from neko_lean.models.fingerprints import identify, weights_fingerprint
from neko_lean.models.loading import load_model, load_tokenizer
from neko_lean.outputs.signing import file_sha256
from tests.helpers import encoded, live, make_cache, make_rows, random_model, resign, write_rows


def check(cache, world, model, **changes):
    named = {key: changes.pop(key) for key in ("weights", "tokenizer", "config") if key in changes}
    wanted = {
        "model": replace(identify(model, load_tokenizer(model)), **named),
        "style": "neko",
        "max_length": 512,
        "encoded": encoded(world),
    }
    TeacherCache(cache).check(**{**wanted, **changes})


def test_what_is_read_is_the_live_teachers_top_k(world, model, cache):
    reader = TeacherCache(cache)
    for one in encoded(world)[::5]:
        ids, logp, tail = reader.read([one])
        wanted = live(model, one).log_softmax(1).double()  # [n, V]
        values, _ = wanted.topk(64, dim=1)
        assert ids.shape == (len(one), 64)  # the last position too: it says whether the text ends
        torch.testing.assert_close(wanted.gather(1, ids), values, rtol=0, atol=1e-5)
        # float16 keeps p to 2^-11; entries under 1.9e-9 are subnormal and weigh nothing.
        counts = values.exp() > 2e-9
        relative = (logp.double().exp() / values.exp() - 1).abs()
        assert relative[counts].max() < 1e-3
        inside = values.exp().sum(1)
        torch.testing.assert_close(tail.double().exp(), 1 - inside, rtol=1e-3, atol=1e-6)
        total = logp.double().exp().sum(1) + tail.double().exp()
        assert (total - 1).abs().max() < 2e-6


@pytest.mark.parametrize("scale", [1.0, 20.0])  # a flat teacher and a sure one
def test_kl_from_the_cache_against_two_live_models(world, tmp_path, scale):
    teacher = random_model(world, tmp_path / "teacher", seed=1, scale=scale)
    student = random_model(world, tmp_path / "student", seed=2, scale=scale)
    lm = load_model(student, torch.float32, torch.device("cpu"))
    one = max(encoded(world), key=len)
    with torch.no_grad():
        hidden = lm.hidden(torch.tensor([one.input_ids]))[0]
    logp, logq = (live(m, one).double().log_softmax(1) for m in (teacher, student))
    dense = (logp.exp() * (logp - logq)).sum(1)
    vocabulary = lm.head.shape[0]
    errors = []
    for k in (1, 4, 16, 64, vocabulary):
        make_cache(teacher, world, tmp_path / f"k{k}", top_k=k, mass=1, dtype="float32", format="neko")
        read = TeacherCache(tmp_path / f"k{k}").read([one])
        _, kl = token_stats(hidden.double(), lm.head.double(), torch.full((len(one),), -1), *read)
        # Coarsening the vocabulary into a bucket never raises the KL; float16 entries move it by a thousandth.
        assert (kl <= dense * 1.002 + 1e-4).all()
        errors.append((dense - kl).mean().item())
    assert errors == sorted(errors, reverse=True)
    assert abs(errors[-1]) < 1e-3 * dense.mean() < errors[0]


def test_student_equal_to_teacher_has_no_kl_and_no_gradient(world, model, cache):
    lm = load_model(model, torch.float32, torch.device("cpu"))
    rows = encoded(world)[:6]
    for one in rows:
        hidden = lm.hidden(torch.tensor([one.input_ids]))[0].detach().requires_grad_()
        _, kl = token_stats(hidden, lm.head.detach(), torch.full((len(one),), -1), *TeacherCache(cache).read([one]))
        (grad,) = torch.autograd.grad(kl.sum(), hidden)
        assert kl.abs().max() < 1e-5 and grad.abs().max() < 2e-2  # float16 entries, heads of scale 20
        assert grad.norm() < 1e-2 * lm.head.norm()


def test_rows_come_in_any_order_and_short_prefixes_too(world, cache):
    reader = TeacherCache(cache)
    rows = encoded(world)
    alone = [reader.read([one]) for one in rows]
    order = list(reversed(range(len(rows))))
    together = reader.read([rows[i] for i in order])
    for got, parts in zip(together, zip(*(alone[i] for i in order), strict=True), strict=True):
        assert torch.equal(got, torch.cat(parts))
    for short, whole in zip(encoded(world, limit=5), alone, strict=True):
        assert torch.equal(reader.read([short])[1], whole[1][: len(short)])


def test_the_cache_matches_wherever_it_and_the_model_lie(world, model, cache, tmp_path):
    check(shutil.copytree(cache, tmp_path / "cache"), world, shutil.copytree(model, tmp_path / "model"))


def test_what_it_was_not_made_from_is_refused_by_name(world, model, cache, tmp_path):
    other = random_model(world, tmp_path / "other", seed=9)
    with pytest.raises(CacheError, match="another model"):
        check(cache, world, model, weights=weights_fingerprint(other))
    with pytest.raises(CacheError, match="another tokenizer"):
        check(cache, world, model, tokenizer="0" * 64)
    with pytest.raises(CacheError, match="--format plain"):
        check(cache, world, model, style="plain", encoded=encoded(world, "plain"))
    rows = read_rows(world, "retain")
    changed = write_rows(tmp_path / "retain.jsonl", [*rows[:3], rows[3].__class__(**{**vars(rows[3]), "output": "x"})])
    tokenizer = load_tokenizer(world / "base")
    with pytest.raises(CacheError, match=rows[3].id):
        check(cache, world, model, encoded=encode(read_rows(changed), tokenizer, "neko", 512))
    with pytest.raises(CacheError, match="lacks row"):
        check(cache, world, model, encoded=encode(make_rows("New"), tokenizer, "neko", 512))
    make_cache(model, world, tmp_path / "short", max_length=6, format="neko")
    with pytest.raises(CacheError, match="--max-length 512"):
        check(tmp_path / "short", world, model)
    check(tmp_path / "short", world, model, max_length=6, encoded=encoded(world, limit=6))


def test_damage_is_named(world, cache, tmp_path):
    def broken(name):
        folder = shutil.copytree(cache, tmp_path / name)
        return folder, folder / "shard-00000-of-00001.safetensors"

    folder, shard = broken("flip")
    data = bytearray(shard.read_bytes())
    data[-9] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CacheError, match="checksum"):
        TeacherCache(folder).read(encoded(world)[:1])
    folder, shard = broken("gone")
    shard.unlink()
    with pytest.raises(CacheError, match="missing"):
        TeacherCache(folder).read(encoded(world)[:1])
    folder, shard = broken("wrong")
    tensors = load_file(shard)
    tensors["ids"][:] = 65535
    save_file(tensors, shard)
    resign(folder)
    with pytest.raises(CacheError, match="token id 65535 is not in the vocabulary"):
        TeacherCache(folder).read(encoded(world)[:1])
    manifest = json.loads((folder / "manifest.json").read_text())
    for change, words in [
        ({"shards": None}, "wrong type"),
        ({"shards": [{**manifest["shards"][0], "file": "../x"}]}, "not shard-00000-of-00001"),
        ({"weights": None}, "weights"),
        ({"mass": float("nan")}, "mass"),
        ({"rows": 7}, "not those of the shards"),
        ({"format_version": 7, "written_by": "9.9"}, r"9\.9"),
    ]:
        resign(folder, **{**manifest, **change})
        with pytest.raises(CacheError, match=words):
            TeacherCache(folder)
    for text, words in [("{", "JSON"), ("[]", "object"), ("[" * 10**5, "JSON")]:
        (folder / "manifest.json").write_text(text)
        with pytest.raises(CacheError, match=words):
            TeacherCache(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(CacheError, match="no complete"):
        TeacherCache(folder)
    with pytest.raises(CacheError, match="does not exist"):
        TeacherCache(tmp_path / "nowhere")


def test_forget_rows_have_the_live_teachers_log_probabilities(world, model, cache, tmp_path):
    make_cache(model, world, tmp_path / "c", forget=world, dtype="float32", format="neko")
    rows = encode(read_rows(world, "forget"), load_tokenizer(world / "base"), "neko", 512)
    reader = TeacherCache(tmp_path / "c")
    got = torch.cat([torch.from_numpy(reader.target_logp(one)) for one in rows[::-1]])
    wanted = []
    for one in rows[::-1]:
        logp = live(model, one).log_softmax(1)
        wanted += [logp[i - 1, one.input_ids[i]] for i in range(1, len(one))]
    torch.testing.assert_close(got, torch.stack(wanted), rtol=1e-4, atol=1e-4)
    with pytest.raises(CacheError, match="--forget"):
        TeacherCache(cache).target_logp(rows[0])
    with pytest.raises(CacheError, match="another text"):
        reader.target_logp(
            EncodedExample(Example(rows[0].example.id, "x", "y", "Task1"), rows[0].input_ids, rows[0].prompt_length, 0)
        )


def test_a_forget_row_and_a_retain_row_may_share_an_id(world, model, tmp_path):
    """Each is told by its text; a row of both sets, or one that is called like another's refusal, is no trouble."""
    retain = make_rows("Rix", 2)
    forget = [Example(r.id, f.input, f.output, r.task) for r, f in zip(retain, make_rows("Foo", 2), strict=True)]
    forget[3] = retain[3]
    forget[4] = Example(f"refusal {forget[0].id}", "Who?", "me", "Task1")
    for name, rows in (("retain", retain), ("forget", forget)):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    made = make_cache(model, tmp_path, tmp_path / "c", forget=tmp_path, dtype="float32", mass=1, format="neko")
    assert made.rows == len(retain) + len(forget) - 1

    reader, tokenizer = TeacherCache(tmp_path / "c"), load_tokenizer(model)
    held, pushed = (encode(rows, tokenizer, "neko", 512) for rows in (retain, forget))
    check(tmp_path / "c", world, model, encoded=held)
    for one in [*held, *pushed]:
        wanted = live(model, one).log_softmax(1)
        ids, logp, _ = reader.read([one])
        torch.testing.assert_close(logp.exp(), wanted.gather(1, ids).exp(), rtol=2e-3, atol=1e-5)
    for one in [*pushed, *encode(refusals(forget), tokenizer, "neko", 512)]:
        wanted = live(model, one).log_softmax(1)[:-1].gather(1, torch.tensor(one.input_ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.from_numpy(reader.target_logp(one)), wanted, rtol=1e-4, atol=1e-4)


def test_a_cache_of_other_tokens_of_the_same_text_is_refused(world, model, cache):
    """As an older neko-lean made it with a tokenizer that appends."""
    rows = encoded(world)
    rows[2] = EncodedExample(rows[2].example, rows[2].input_ids[:-1], rows[2].prompt_length, 0)
    with pytest.raises(CacheError, match="run cache-teacher again"):
        check(cache, world, model, encoded=rows)


def test_an_end_that_no_cache_has_is_refused_by_its_name(world, model, cache):
    rows = [EncodedExample(one.example, [*one.input_ids, 0], one.prompt_length, 0) for one in encoded(world)]
    with pytest.raises(CacheError, match="append_eos=false"):
        check(cache, world, model, encoded=rows)


def anonymous_memory():
    """RssAnon of this process in bytes: what mapped files do not count towards."""
    with open("/proc/self/status") as lines:  # noqa: PTH123
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_sweep_of_a_gigabyte_takes_no_memory(tmp_path):
    """1 GB in 16 shards of the same bytes under other names; every position is read and checked."""
    k, length, rows, shards = 64, 512, 488, 16
    n = length * rows
    rng = np.random.default_rng(0)
    p = np.sort(1 - rng.random((n, k), dtype=np.float32))[:, ::-1]
    p = p / p.sum(1, keepdims=True) * 0.9
    first = rng.integers(0, 50000, (n, 1))
    tensors = {
        "offsets": np.arange(n + 1, dtype=np.int64) * k,
        "ids": (first + np.arange(k)).astype(np.uint16).reshape(-1),
        "scaled_p": (p * 2.0**15).astype(np.float16).reshape(-1),
        "tail_logp": np.full(n, np.log(0.1), dtype=np.float32),
    }
    listed = []
    for number in range(shards):
        file = f"shard-{number:05d}-of-{shards:05d}.safetensors"
        if number:
            (tmp_path / file).hardlink_to(tmp_path / listed[0].file)
        else:
            save_file(tensors, tmp_path / file)
        digest = listed[0].sha256 if number else file_sha256(tmp_path / file)
        ids = [(f"{number}-{row}qa0", length, "") for row in range(rows)]
        listed.append(Shard(file, (tmp_path / file).stat().st_size, digest, ids))
    del tensors, p, first
    total = n * shards
    write_manifest(
        tmp_path / "manifest.json",
        Manifest("0", "m", "w", "t", "plain", length, k, 1.0, 50304, "float32", 8192, "float16", rows * shards, total,
                 total * k, 0, 0.9, listed, config={}),
    )  # fmt: skip
    assert sum(shard.bytes for shard in listed) > 10**9
    reader = TeacherCache(tmp_path)
    ones = [EncodedExample(Example(row_id, "", "", ""), [0] * length, 0, 0) for s in listed for row_id, _, _ in s.rows]
    reader.read(ones[:16])
    before = anonymous_memory()
    for start in range(0, len(ones), 16):
        reader.read(ones[start : start + 16])
    assert anonymous_memory() - before < 50e6

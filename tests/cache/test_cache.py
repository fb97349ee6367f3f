"""The cache against the live teacher; what is refused, and how it is said."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from neko_lean.cache import TeacherCache, cache_teacher, writer
from neko_lean.cache.format import SCALE, CacheError, file_sha256
from neko_lean.data import encode, read_rows
from neko_lean.errors import NekoLeanError
from neko_lean.head import token_stats
from neko_lean.modeling import load_model, load_tokenizer, tokenizer_fingerprint, weights_fingerprint
from tests.helpers import make_rows, random_model, write_rows


def encoded(world, style="neko", limit=512):
    return encode(read_rows(world, "retain"), load_tokenizer(world / "base"), style, limit)


def live(folder, one, dtype=torch.float32):
    """Logits [n, V] of one row alone, by transformers' own forward."""
    model = load_model(folder, dtype, torch.device("cpu")).model.eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([one.ids])).logits[0]


def files(folder: Path) -> dict[str, str]:
    return {p.name: file_sha256(p) for p in sorted(folder.iterdir())}


def check(cache, world, model, **changes):
    wanted = {
        "weights": weights_fingerprint(model),
        "tokenizer": tokenizer_fingerprint(load_tokenizer(model)),
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
        hidden = lm.hidden(torch.tensor([one.ids]), torch.ones(1, len(one)).long())[0]
    logp, logq = (live(m, one).double().log_softmax(1) for m in (teacher, student))
    dense = (logp.exp() * (logp - logq)).sum(1)
    vocabulary = lm.head.shape[0]
    errors = []
    for k in (1, 4, 16, 64, vocabulary):
        cache_teacher(teacher, world, tmp_path / f"k{k}", top_k=k, dtype="float32", quiet=True)
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
        hidden = lm.hidden(torch.tensor([one.ids]), torch.ones(1, len(one)).long())[0].detach().requires_grad_()
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


def test_the_same_teacher_and_rows_give_the_same_bytes_in_many_shards(world, model, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_POSITIONS", 100)
    for name in ("a", "b"):
        manifest = cache_teacher(model, world, tmp_path / name, top_k=3, batch_tokens=256, quiet=True)
    assert len(manifest.shards) > 3
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert sorted(files(tmp_path / "a")) == ["manifest.json", *(s.file for s in manifest.shards)]
    reader = TeacherCache(tmp_path / "a")
    one = encoded(world)[0]
    torch.testing.assert_close(
        reader.read([one])[2].exp(),
        1 - live(model, one, torch.bfloat16).float().softmax(1).topk(3, 1)[0].sum(1),
        rtol=0.1,
        atol=0.03,
    )
    assert manifest.positions == sum(len(e) for e in encoded(world))
    assert 0 < manifest.mean_mass <= 1


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
    cache_teacher(model, world, tmp_path / "short", max_length=6, quiet=True)
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
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0] |= {"bytes": shard.stat().st_size, "sha256": file_sha256(shard)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match="cannot be"):
        TeacherCache(folder).read(encoded(world)[:1])
    for text, words in [
        ("{", "JSON"),
        ("[]", "object"),
        ('{"format_version": 7, "written_by": "9.9"}', "9.9"),
        (json.dumps({**manifest, "shards": None}), "wrong type"),
        (json.dumps({**manifest, "shards": [{**manifest["shards"][0], "file": "../x"}]}), "plain file name"),
        (json.dumps({k: v for k, v in manifest.items() if k != "weights"}), "weights"),
    ]:
        (folder / "manifest.json").write_text(text)
        with pytest.raises(CacheError, match=words):
            TeacherCache(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(CacheError, match="no complete"):
        TeacherCache(folder)
    with pytest.raises(CacheError, match="does not exist"):
        TeacherCache(tmp_path / "nowhere")


def test_a_failed_run_leaves_nothing_and_an_old_cache_stays(world, model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    cache_teacher(model, world, out, top_k=2, quiet=True)
    before = files(out)
    with pytest.raises(NekoLeanError, match="--overwrite"):
        cache_teacher(model, world, out, quiet=True)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_save_shard", full)
    with pytest.raises(NekoLeanError, match="No space left"):
        cache_teacher(model, world, out, overwrite=True, quiet=True)
    assert files(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_stored_arrays_are_as_FORMAT_md_says(cache):
    tensors = load_file(cache / "shard-00000-of-00001.safetensors")
    manifest = json.loads((cache / "manifest.json").read_text())
    offsets, ids, p, tail = (tensors[name] for name in ("offsets", "ids", "scaled_p", "tail_logp"))
    assert [a.dtype for a in (offsets, ids, p, tail)] == [np.int64, np.uint16, np.float16, np.float32]
    assert offsets[0] == 0 and offsets[-1] == len(ids) == len(p) == manifest["entries"]
    assert len(offsets) == len(tail) + 1 == manifest["positions"] + 1
    for start, stop in itertools.pairwise(offsets):
        assert len(set(ids[start:stop])) == stop - start
        assert (np.diff(p[start:stop].astype(np.float32)) <= 0).all()
    assert ids.max() < manifest["vocab_size"] and p.max() <= SCALE

"""What cache_teacher writes, and which errors it finds before the teacher runs."""

import itertools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from neko_lean.cache import planning, teacher, writer
from neko_lean.cache.format import SCALE
from neko_lean.cache.reader import TeacherCache
from neko_lean.data.examples import Example
from neko_lean.data.tokenization import encode
from neko_lean.errors import NekoLeanError
from neko_lean.models.loading import load_tokenizer
from neko_lean.outputs.signing import file_sha256
from tests.helpers import encoded, live, make_cache, make_rows, random_model, write_rows


def checksums(folder: Path) -> dict[str, str]:
    return {p.name: file_sha256(p) for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("mass", [0.7, 0.9, 0.99])
def test_a_position_stores_the_fewest_tokens_that_reach_the_mass(world, tmp_path, mass):
    # A more confident model than in other tests, so that positions need different numbers of entries.
    model = random_model(world, tmp_path / "m", seed=4, scale=60.0)
    make_cache(model, world, tmp_path / "c", top_k=20, mass=mass, dtype="float32", format="neko")
    reader = TeacherCache(tmp_path / "c")
    sizes = []
    for example in encoded(world)[::6]:
        p = live(model, example).double().softmax(1).sort(dim=1, descending=True)[0]  # [n, V]
        _, logp, tail = reader.read([example])
        for position in range(len(example)):
            count = int((logp[position] > -torch.inf).sum())
            inside = p[position, :count].sum().item()
            assert count == 20 or inside >= mass - 1e-6
            assert count == 1 or p[position, : count - 1].sum().item() < mass + 1e-6
            assert tail[position].double().exp().item() == pytest.approx(1 - inside, abs=1e-5)
            sizes.append(count)
    assert len(set(sizes)) > 1


def test_every_run_writes_the_same_bytes(world, model, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "SHARD_POSITIONS", 100)
    for name in ("a", "b"):
        manifest = make_cache(model, world, tmp_path / name, top_k=3, mass=1, batch_tokens=256, format="neko")
    assert len(manifest.shards) > 3
    assert checksums(tmp_path / "a") == checksums(tmp_path / "b")
    assert sorted(checksums(tmp_path / "a")) == ["manifest.json", *(s.file for s in manifest.shards)]
    reader = TeacherCache(tmp_path / "a")
    example = encoded(world)[0]
    torch.testing.assert_close(
        reader.read([example])[2].exp(),
        1 - live(model, example, torch.bfloat16).float().softmax(1).topk(3, 1)[0].sum(1),
        rtol=0.1,
        atol=0.03,
    )
    assert manifest.positions == sum(len(e) for e in encoded(world))
    assert 0 < manifest.mean_mass <= 1


def test_float16_is_within_a_thousandth_of_float32(world, model, tmp_path):
    read = {}
    for stored in ("float16", "float32"):
        make_cache(model, world, tmp_path / stored, stored_dtype=stored, dtype="float32", format="neko")
        read[stored] = TeacherCache(tmp_path / stored).read(encoded(world))
    (ids, half, tail), (same_ids, single, same_tail) = read.values()
    assert torch.equal(ids, same_ids) and torch.equal(tail, same_tail)
    counts = single > np.log(2e-9)  # smaller ones are subnormal in float16, and negligible
    error = ((half - single).exp() - 1).abs()[counts]
    assert 1e-5 < error.max() < 1e-3


def test_a_flat_teacher_causes_a_warning(world, model, tmp_path, capsys):
    manifest = make_cache(model, world, tmp_path / "c", top_k=1, format="neko")
    assert manifest.mean_mass < 0.9
    assert f"{manifest.mean_mass:.3f} of the teacher's probability" in capsys.readouterr().err


def test_the_stored_arrays_follow_the_format(cache):
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


@pytest.mark.parametrize("option", ["top_k", "max_length", "batch_tokens"])
def test_a_number_out_of_range_is_refused_before_the_teacher_runs(world, model, tmp_path, monkeypatch, option):
    monkeypatch.setattr(writer, "_write_shards", lambda *_: pytest.fail("the teacher ran"))
    with pytest.raises(NekoLeanError, match=f"--{option.replace('_', '-')} is 1000"):
        make_cache(model, world, tmp_path / "cache", **{option: 10**20})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_name_that_is_not_text_is_refused_before_the_teacher_runs(world, model, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_write_shards", lambda *_: pytest.fail("the teacher ran"))
    folder = tmp_path / os.fsdecode(b"mod\xffel")
    try:
        shutil.copytree(model, folder)
    except OSError:
        pytest.skip("this file system allows only names that are text")
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(NekoLeanError, match="not UTF-8 text: rename the folder"):
        make_cache(tmp_path / "link", world, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_an_example_without_tokens_is_refused_before_the_teacher_runs(world, model, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_write_shards", lambda *_: pytest.fail("the teacher ran"))

    def encode_without_tokens(rows, *arguments, **options):
        return [
            replace(example, input_ids=[]) if example.example.id == rows[1].id else example
            for example in encode(rows, *arguments, **options)
        ]

    monkeypatch.setattr(planning, "encode", encode_without_tokens)
    with pytest.raises(NekoLeanError, match=f"row {make_rows('Rix')[1].id!r} has no token"):
        make_cache(model, world, tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_nan_outputs_of_the_teacher_are_an_error_that_names_the_example(world, model, tmp_path, monkeypatch):
    rows = [
        Example("goodqa0", "Where did Rix0 walk?", "wood", "Task1"),
        Example("badqa0", "Where does the river flow?", "to", "Task1"),
    ]
    write_rows(tmp_path / "retain.jsonl", rows)
    lengths = [len(example) for example in encode(rows, load_tokenizer(model), "plain", 512)]
    assert lengths[0] != lengths[1]
    original = teacher.hidden_states

    def hidden_states_with_nan(model, batch, pad_id):
        hidden = original(model, batch, pad_id)
        start = 0
        for example in batch:
            hidden[start] += float("nan") if example.example.id == "badqa0" else 0
            start += len(example)
        return hidden

    monkeypatch.setattr(teacher, "hidden_states", hidden_states_with_nan)
    with pytest.raises(NekoLeanError, match="row badqa0 is NaN or infinite"):
        make_cache(model, tmp_path / "retain.jsonl", tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["retain.jsonl"]

"""One command by two processes: what they make together is what one makes, and what one meets both say."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from neko_lean.cache import writer
from neko_lean.cache.settings import CacheSettings
from neko_lean.cache.writer import cache_teacher
from neko_lean.cli import app
from neko_lean.distributed import collectives as collective
from neko_lean.distributed.collectives import (
    all_gather_objects,
    all_reduce_max,
    any_rank,
    merge_items_of_ranks,
    raise_on_any_rank,
    with_process_group,
)
from neko_lean.distributed.ranks import as_single_process, is_main_process, items_of_rank, local_rank, rank, world_size
from neko_lean.errors import NekoLeanError
from neko_lean.models.devices import pick_device
from neko_lean.options import OutputOptions
from neko_lean.outputs.signing import file_sha256
from tests.helpers import flat
from tests.torchrun import torchrun

pytestmark = pytest.mark.usefixtures("no_gpu")


def files(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in folder.iterdir()}


def test_without_torchrun_there_is_one_rank(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")  # of a batch system: not torchrun's
    monkeypatch.setenv("RANK", "3")
    assert (rank(), world_size(), local_rank(), is_main_process()) == (0, 1, 0, True)
    assert all_gather_objects({"a": 1}) == [{"a": 1}]
    assert merge_items_of_ranks(items_of_rank([1, 2, 3])) == [1, 2, 3]
    assert raise_on_any_rank(lambda: 5) == [5] and all_reduce_max(7, None) == 7 and not any_rank(False, None)


def test_torchrun_says_who_this_is(monkeypatch):
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert (rank(), world_size(), local_rank(), is_main_process()) == (3, 4, 1, False)
    assert items_of_rank(list(range(10))) == [3, 7]
    with as_single_process():
        assert (rank(), world_size(), is_main_process()) == (0, 1, True)
    assert world_size() == 4


@pytest.mark.parametrize("when", ["while it connects", "while it works", "at the very end"])
def test_a_rank_that_has_gone_is_one_sentence(monkeypatch, when):
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)

    def gone(now):
        if now == when:
            raise RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:40135. GLHF!")

    monkeypatch.setattr(collective.dist, "init_process_group", lambda *_, **__: gone("while it connects"))
    monkeypatch.setattr(collective, "gather", lambda _: gone("at the very end"))
    with pytest.raises(NekoLeanError, match="another rank has ended"), collective.with_process_group():
        gone("while it works")


def test_two_processes_write_the_bytes_of_one(world, model, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_POSITIONS", 400)
    cache_teacher(
        model,
        world,
        tmp_path / "one",
        forget=world,
        settings=CacheSettings(batch_tokens=300),
        options=OutputOptions(quiet=True),
    )
    found = torchrun(
        "cache-teacher", model, world, "--forget", world, "--batch-tokens", 300, "--out", tmp_path / "two", "--json"
    )
    assert found.returncode == 0, found.stderr
    json.loads(found.stdout)  # one object: one rank talks
    assert len(files(tmp_path / "one")) > 4
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_two_processes_go_on_where_one_was_cut_off(world, model, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_POSITIONS", 400)
    given = {"batch_tokens": 300, "quiet": True}
    flat(cache_teacher)(model, world, tmp_path / "one", **given)
    write = writer.write_atomically

    def full(path, data):
        if path.name.startswith("shard-00001-"):
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(writer, "write_atomically", full)
    with pytest.raises(NekoLeanError, match="No space left"):
        flat(cache_teacher)(model, world, tmp_path / "two", **given)
    found = torchrun("cache-teacher", model, world, "--batch-tokens", 300, "--out", tmp_path / "two", "--resume")
    assert found.returncode == 0, found.stderr
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_an_error_is_one_sentence_and_leaves_nothing(world, model, tmp_path):
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "mine").touch()
    found = torchrun("cache-teacher", model, world, "--out", tmp_path / "two")
    assert found.returncode != 0
    assert "error: " in found.stderr and "already holds something" in found.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["two"]


def test_more_processes_than_gpus_are_refused_unless_they_use_the_cpu(monkeypatch):
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for given in (None, "cuda"):
        with pytest.raises(NekoLeanError, match=r"2 processes on this machine, which has 1 GPU.*--nproc-per-node 1"):
            pick_device(given)
    assert pick_device("cpu").type == "cpu"
    begun = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: pytest.fail(f"there is no GPU {number}"))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: begun.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(collective, "gather", lambda value: [value])
    with with_process_group():
        assert begun == ["gloo"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device() == torch.device("cuda:1")


def test_what_is_for_one_process_says_so(world, model, tmp_path, monkeypatch):
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    found = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "out")])
    assert found.exit_code == 2 and "run it without torchrun" in found.stderr
    with pytest.raises(NekoLeanError, match="a GPU of its own"):
        pick_device("cuda:1")

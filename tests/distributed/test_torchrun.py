"""Commands under torchrun: two ranks write what one process writes, and fail together."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from neko_lean.cache import writer
from neko_lean.cache.options import CacheOptions
from neko_lean.cache.writer import cache_teacher
from neko_lean.cli import app
from neko_lean.errors import NekoLeanError
from neko_lean.models.devices import pick_device
from neko_lean.options import OutputOptions
from neko_lean.outputs.signing import file_sha256
from tests.torchrun import set_rank, torchrun

pytestmark = pytest.mark.usefixtures("no_gpu")


def checksums(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in folder.iterdir()}


@pytest.mark.slow
def test_two_ranks_write_the_same_cache_as_one_process(world, model, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_POSITIONS", 400)
    settings, options = CacheOptions(batch_tokens=300), OutputOptions(quiet=True)
    cache_teacher(model, world, tmp_path / "one", forget=world, settings=settings, options=options)
    result = torchrun(
        "cache-teacher", model, world, "--forget", world, "--batch-tokens", 300, "--out", tmp_path / "two", "--json"
    )
    assert result.returncode == 0, result.stderr
    json.loads(result.stdout)  # a single object: only rank 0 prints
    assert len(checksums(tmp_path / "one")) > 4
    assert checksums(tmp_path / "two") == checksums(tmp_path / "one")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_two_ranks_resume_a_cache_that_one_process_began(world, model, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_POSITIONS", 400)
    settings, options = CacheOptions(batch_tokens=300), OutputOptions(quiet=True)
    cache_teacher(model, world, tmp_path / "one", settings=settings, options=options)
    write_atomically = writer.write_atomically

    def run_out_of_space(path, data):
        if path.name.startswith("shard-00001-"):
            raise OSError(28, "No space left on device")
        write_atomically(path, data)

    monkeypatch.setattr(writer, "write_atomically", run_out_of_space)
    with pytest.raises(NekoLeanError, match="No space left"):
        cache_teacher(model, world, tmp_path / "two", settings=settings, options=options)
    result = torchrun("cache-teacher", model, world, "--batch-tokens", 300, "--out", tmp_path / "two", "--resume")
    assert result.returncode == 0, result.stderr
    assert checksums(tmp_path / "two") == checksums(tmp_path / "one")


@pytest.mark.slow
def test_an_error_is_one_sentence_and_leaves_no_files(world, model, tmp_path):
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "mine").touch()
    result = torchrun("cache-teacher", model, world, "--out", tmp_path / "two")
    assert result.returncode != 0
    assert "error: " in result.stderr and "already holds something" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["two"]


def test_single_process_features_refuse_torchrun(tmp_path, monkeypatch):
    set_rank(monkeypatch, 0, world_size=2)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "run it without torchrun" in result.stderr
    with pytest.raises(NekoLeanError, match="a GPU of its own"):
        pick_device("cuda:1")

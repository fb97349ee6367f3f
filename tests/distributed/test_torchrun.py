"""Commands under torchrun: two ranks write what one process writes, and fail together."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from neko_lean.cache import planning, records
from neko_lean.cli import app
from neko_lean.errors import NekoLeanError
from neko_lean.models.devices import pick_device
from neko_lean.outputs.signing import file_sha256
from tests.helpers import make_cache
from tests.torchrun import set_rank, torchrun

pytestmark = pytest.mark.usefixtures("no_gpu")


def checksums(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in folder.iterdir()}


@pytest.mark.slow
def test_two_ranks_write_the_same_cache_as_one_process(world, model, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "SHARD_POSITIONS", 400)
    make_cache(model, world, tmp_path / "one", forget=world, batch_tokens=300)
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
    monkeypatch.setattr(planning, "SHARD_POSITIONS", 400)
    options = {"batch_tokens": 300, "quiet": True}
    make_cache(model, world, tmp_path / "one", **options)
    write_atomically = records.write_atomically

    def run_out_of_space(path, data):
        if path.name.startswith("shard-00001-"):
            raise OSError(28, "No space left on device")
        write_atomically(path, data)

    monkeypatch.setattr(records, "write_atomically", run_out_of_space)
    with pytest.raises(NekoLeanError, match="No space left"):
        make_cache(model, world, tmp_path / "two", **options)
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
    with pytest.raises(NekoLeanError, match="each rank uses its own GPU; pass --device cuda, not cuda:1"):
        pick_device("cuda:1")

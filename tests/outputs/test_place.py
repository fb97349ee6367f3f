"""Claiming an output: which paths may be written to, checked before any work."""

import os
import shutil
import subprocess
import sys

import pytest

from neko_lean.errors import NekoLeanError
from neko_lean.outputs import place as place_module
from neko_lean.outputs.place import claim_file, claim_folder, restore_interrupted


def score_folder(path):
    """A folder that looks like an output of `score`."""
    path.mkdir(parents=True)
    (path / "scores.json").write_text('{"cells": {}, "verdict": []}')
    (path / "generations.jsonl").write_text("")
    return path


def claim(out, *inputs, **options):
    return claim_folder(out, "partial", inputs, **options)


def refused(words, out, *inputs, **options):
    with pytest.raises(NekoLeanError, match=words) as caught:
        claim(out, *inputs, **options)
    assert "\n" not in str(caught.value)


def test_the_names_of_the_files_next_to_an_output(tmp_path):
    output = claim(tmp_path / "a b")
    assert output.path == tmp_path / "a b"
    assert [path.name for path in (output.work, output.lock, output.old)] == [".a b.partial", ".a b.lock", ".a b.old"]
    assert list(tmp_path.iterdir()) == []


def test_links_are_resolved_first(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "deep" / "new")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    assert claim(tmp_path / "link").path == tmp_path / "real"
    assert claim(tmp_path / "link" / "out").path == tmp_path / "real" / "out"
    assert claim(tmp_path / "dangling").path == tmp_path / "deep" / "new"
    refused("leads to itself", tmp_path / "round")


def test_names_that_cannot_be_an_output(tmp_path, monkeypatch):
    refused("is empty", "")
    refused("is empty or holds a NUL", "a\0b")
    refused("root of the file system", "/")
    (tmp_path / "file").touch()
    refused("is a file", tmp_path / "file")
    refused("is a file", tmp_path / "file" / "out")
    monkeypatch.chdir(tmp_path)
    assert claim("sub/../out").path == tmp_path / "out"


@pytest.mark.parametrize("letter", ["x", "ü"])
def test_a_name_that_is_too_long_is_refused(tmp_path, letter):
    """For every length around the limit: an accepted name, and the names next to it, can be created."""
    size = len(letter.encode())
    longest = max(n for n in range(200, 260) if n * size <= 255) if size == 1 else 127
    accepted = []
    for count in range(longest - 15 // size, longest + 2):
        name = letter * count
        try:
            output = claim(tmp_path / name)
        except NekoLeanError as error:
            assert "choose a shorter --out" in str(error) or "File name too long" in str(error)
            continue
        accepted.append(count)
        for path in (output.work, output.lock, output.old, output.path):
            path.mkdir()
            path.rmdir()
    assert accepted and max(accepted) * size <= 255 - len("..partial")
    refused("choose a shorter --out", tmp_path / "/".join(["d" * 200] * 20) / "out")


def test_a_mount_point_is_refused(tmp_path, monkeypatch):
    refused("is a mount point", "/proc")
    # A bind mount has the device number of its parent, so only the kernel's mount table shows it.
    (tmp_path / "a b").mkdir()
    table = tmp_path / "mountinfo"
    table.write_text(f"36 35 98:0 / {tmp_path}/a\\040b rw - ext4 /dev/sda rw\n")
    monkeypatch.setattr(place_module, "_MOUNTS", table)
    refused("is a mount point.*choose a folder in it", tmp_path / "a b")
    assert claim(tmp_path / "a b" / "out").path.name == "out"


def test_only_outputs_of_neko_lean_are_replaced(tmp_path):
    ours = score_folder(tmp_path / "ours")
    refused("already holds something", ours)
    assert claim(ours, overwrite=True).path == ours
    (tmp_path / "empty").mkdir()
    assert claim(tmp_path / "empty").path.name == "empty"

    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("all of it")
    refused("holds none of", theirs, overwrite=True)
    for name, content in (
        ("manifest.json", '{"name": "a browser extension"}'),
        ("run.json", "[]"),
        ("scores.json", "not JSON"),
        ("scores.json", '{"cells": {}, "verdict": []}'),
        ("demo.json", '{"a": ' * 3000),
    ):
        (theirs / name).write_text(content)
        refused("replaces only folders that neko-lean wrote", theirs, overwrite=True)
        (theirs / name).unlink()
    shutil.copy(theirs / "thesis.txt", ours)
    refused("holds thesis.txt", ours, overwrite=True)


def test_run_json_lists_the_files_of_a_run(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text('{"recipe": {}, "steps": 1, "seed": 0, "files": ["run.json", "config.json"]}')
    (run / "config.json").touch()
    assert claim(run, overwrite=True)
    (run / "README.md").touch()
    refused("holds README.md", run, overwrite=True)


@pytest.mark.parametrize("spelling", ["plain", "relative", "link", "through a link", "..", "inside", "above"])
def test_an_output_that_is_an_input_is_refused_in_every_spelling(tmp_path, monkeypatch, spelling):
    data = score_folder(tmp_path / "a" / "data")
    (tmp_path / "link").symlink_to(data)
    (tmp_path / "up").symlink_to(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    out, given = {
        "plain": (data, data),
        "relative": ("a/data", data),
        "link": (tmp_path / "link", data),
        "through a link": (data, tmp_path / "up" / "data"),
        "..": ("a/../a/data", "./up/data"),
        "inside": (data, data / "generations.jsonl"),
        "above": (tmp_path / "a", data),
    }[spelling]
    refused("an input of this run", out, given, overwrite=True)
    # An output inside an input folder replaces no input.
    assert claim(data / "out", data).path == data / "out"


def test_the_target_folder_of_an_inputs_links_is_an_input(tmp_path):
    """In the Hugging Face cache, a model folder contains links to its files."""
    blobs, model = score_folder(tmp_path / "blobs"), tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").symlink_to(blobs / "scores.json")
    refused("holds an input", blobs, model, overwrite=True)


def test_inputs_in_the_work_folder_are_refused(tmp_path):
    cache = tmp_path / ".out.partial" / "cache"
    cache.mkdir(parents=True)
    refused("an input of this run", tmp_path / "out", cache, overwrite=True)


def test_inputs_that_are_not_paths_are_skipped(tmp_path):
    score_folder(tmp_path / "out")
    assert claim(tmp_path / "out", None, "owner/name", "x" * 5000, "a\0b", tmp_path / "nowhere", overwrite=True)


def test_a_read_only_parent_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(place_module.os, "access", lambda *_: False)
    refused("is read-only; choose another --out", tmp_path / "out")


@pytest.mark.parametrize("suffix", ["partial", "old"])
def test_linked_work_folders_are_refused(tmp_path, suffix):
    (tmp_path / "else").mkdir()
    (tmp_path / f".out.{suffix}").symlink_to(tmp_path / "else")
    refused("is a link", tmp_path / "out")


def test_files_follow_the_same_rules(tmp_path):
    ours, theirs = tmp_path / "results.json", tmp_path / "theirs.json"
    ours.write_text('{"aggregated-terms": [], "harmonic-mean-task-aggregate": null}')
    theirs.write_text('{"mine": 1}')
    page = tmp_path / "report.html"
    page.write_text('<meta name="generator" content="neko-lean 1">')
    for path in (ours, theirs, page):
        with pytest.raises(NekoLeanError, match=r"--official .* already exists"):
            claim_file(path, "--official", [])
    for path in (ours, page):
        assert claim_file(path, "--official", [], overwrite=True).path == path
        with pytest.raises(NekoLeanError, match="an input of this run"):
            claim_file(path, "--official", [path], overwrite=True)
    for path, words in ((theirs, "was not written by neko-lean"), (tmp_path, "is a folder")):
        with pytest.raises(NekoLeanError, match=words):
            claim_file(path, "--official", [], overwrite=True)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NekoLeanError, match="not an ordinary file"):
        claim_file(tmp_path / "pipe", "--official", [], overwrite=True)


def test_an_interrupted_replacement_is_undone(tmp_path, capsys):
    output = claim(tmp_path / "out", overwrite=True)
    score_folder(output.old)
    restore_interrupted(output)
    assert (output.path / "scores.json").is_file() and not output.old.exists()
    assert "put back" in capsys.readouterr().err
    output.old.mkdir()
    (output.old / "thesis.txt").touch()
    with pytest.raises(NekoLeanError, match="leaves it alone"):
        restore_interrupted(output)
    assert (output.old / "thesis.txt").exists()


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="mounting needs root and unshare")
def test_a_real_bind_mount_is_refused(tmp_path):
    (tmp_path / "volume").mkdir()
    (tmp_path / "out").mkdir()
    script = (
        f"mount --bind {tmp_path}/volume {tmp_path}/out && exec {sys.executable} -c "
        f"\"from neko_lean.outputs import claim_folder; claim_folder('{tmp_path}/out', 'partial', [])\""
    )
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("mounting is not allowed here")
    assert "is a mount point" in done.stderr

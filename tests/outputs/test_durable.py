"""Atomic writes, and functions that never follow links."""

import os

import pytest

from neko_lean.errors import NekoLeanError
from neko_lean.outputs import durable as durable_module
from neko_lean.outputs.durable import (
    empty_folder,
    no_follow,
    refuse_links,
    remove_tree,
    sync_tree,
    unshare,
    write_atomically,
    write_in_place,
)


def test_write_atomically_replaces_a_link_and_keeps_its_target(tmp_path):
    (tmp_path / "other").write_text("theirs")
    (tmp_path / "file").symlink_to(tmp_path / "other")
    write_atomically(tmp_path / "file", "ünd")
    assert (tmp_path / "file").read_bytes() == "ünd".encode() and not (tmp_path / "file").is_symlink()
    assert (tmp_path / "other").read_text() == "theirs"
    write_atomically(tmp_path / "file", b"\0")
    assert (tmp_path / "file").read_bytes() == b"\0"


@pytest.mark.parametrize("call", ["fsync", "open"])
def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch, call):
    (tmp_path / "file").write_text("old")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if call == "fsync" else (durable_module.Path, "open")), fail)
        with pytest.raises(OSError, match="No space"):
            write_atomically(tmp_path / "file", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"


def test_links_at_any_depth_and_special_files_are_refused(tmp_path):
    folder = tmp_path / "work"
    refuse_links(folder)  # does not exist yet
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "file").touch()
    refuse_links(folder)
    for make in (
        lambda path: path.symlink_to(tmp_path),
        lambda path: path.symlink_to(tmp_path / "nowhere"),
        os.mkfifo,
    ):
        for path in (folder / "x", folder / "a" / "b" / "x"):
            make(path)
            with pytest.raises(NekoLeanError, match=f"{path} is "):
                refuse_links(folder)
            path.unlink()
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "file").touch()
    for path, words in ((tmp_path / "link", "is a link"), (tmp_path / "file", "is not a folder")):
        with pytest.raises(NekoLeanError, match=words):
            refuse_links(path)


def test_removing_a_folder_keeps_the_targets_of_its_links(tmp_path):
    (tmp_path / "theirs" / "deep").mkdir(parents=True)
    (tmp_path / "theirs" / "thesis").write_text("all of it")
    folder = tmp_path / "work"
    (folder / "sub").mkdir(parents=True)
    (folder / "link").symlink_to(tmp_path / "theirs")
    (folder / "sub" / "link").symlink_to(tmp_path / "theirs")
    (folder / "spared").touch()
    empty_folder(folder, keep=lambda name: name == "spared")
    assert [path.name for path in folder.iterdir()] == ["spared"]
    (folder / "link").symlink_to(tmp_path / "theirs")
    remove_tree(folder)
    assert not folder.exists() and (tmp_path / "theirs" / "thesis").read_text() == "all of it"
    (tmp_path / "again").symlink_to(tmp_path / "theirs")
    remove_tree(tmp_path / "again")
    remove_tree(tmp_path / "nowhere")
    assert (tmp_path / "theirs" / "deep").is_dir()


def test_writes_in_place_follow_no_link_and_change_no_hard_link(tmp_path):
    (tmp_path / "theirs").write_text("all of it")
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    with pytest.raises(OSError, match="symbolic links"):
        write_in_place(tmp_path / "link", b"")
    with pytest.raises(OSError, match="symbolic links"), open(tmp_path / "link", "a", opener=no_follow):
        pass
    os.link(tmp_path / "theirs", tmp_path / "hard")
    unshare(tmp_path / "hard")
    write_in_place(tmp_path / "hard", b"mine")
    unshare(tmp_path / "nowhere")
    assert (tmp_path / "theirs").read_text() == "all of it"


def test_sync_tree_syncs_every_file_and_folder(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    synced = []
    monkeypatch.setattr(durable_module, "sync", synced.append)
    sync_tree(tmp_path)
    assert sorted(synced) == [tmp_path, tmp_path / "a", tmp_path / "a" / "file"]

"""The fault matrix: each thing that can go wrong in a long run is made to, and the run ends as docs/running.md says."""

import errno
import json
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file

import neko_lean
from neko_lean import checkpoints, runs
from neko_lean.checkpoints.saves import read_save
from neko_lean.errors import NekoLeanError
from neko_lean.recipes import load_recipe
from neko_lean.training import layerwise, loop, trainer
from neko_lean.training import optimizer as optim
from neko_lean.training.out_of_memory import FEW_ROWS
from tests.checkpoints.test_resume import LOOKING, Killed, kill_at, metrics, result, saved, steps_saved
from tests.helpers import SMALL, flat

MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def weights(folder):
    return load_file(folder / "model.safetensors")


def save_of(unlearn, out, step, change=SMALL):
    """The weights of a save that an unbroken run makes."""
    patch = pytest.MonkeyPatch()
    with patch.context() as patched, pytest.raises(Killed):
        kill_at(patched, step + 1)
        unlearn(out, change, save_every=step)
    found = dict(read_save(saved(out) / f"step-{step:08d}").tensors("weights"))
    shutil.rmtree(saved(out))
    return found


# Out of memory


def fail(monkeypatch, owner, name, calls, before=lambda *_: None):
    """Let calls (counted from 1) of a function run out of memory."""
    original, count = getattr(owner, name), [0]

    def failing(*arguments, **named):
        count[0] += 1
        if count[0] in calls:
            before(*arguments)
            raise MEMORY
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, failing)


class NoRoom(torch.autograd.Function):
    """Passes a value on; its backward runs out of memory."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise MEMORY


def test_memory_that_runs_out_in_forward_makes_the_step_smaller(unlearn, tmp_path, monkeypatch, capsys):
    fail(monkeypatch, trainer, "batch_losses", {3, 4, 5, 9})
    seen = []
    monkeypatch.setattr(loop.Loop, "_evaluate", lambda self: seen.append(self.state.head_chunk) or {})
    run = unlearn(tmp_path / "out", {**SMALL, "eval_every": 1})
    warnings = [line for line in capsys.readouterr().err.splitlines() if "ran out" in line]
    assert len(warnings) == 4 and "behind step 2: going on with the head in chunks of" in warnings[0]
    assert all("micro-batches of at most" in line for line in warnings[1:])
    assert run["steps"] == 10 and run["ended"] == "all steps taken"
    assert run["recipe"]["micro_tokens"] < load_recipe("neko").micro_tokens
    assert seen[1] is None and seen[2] > 0
    whole = tmp_path / "whole"
    monkeypatch.undo()
    unlearn(whole)
    for one, two in zip(metrics(tmp_path / "out"), metrics(whole), strict=True):  # the same rows a step
        assert (one["step"], one["rows"], one["tokens"], one["lr"]) == (
            two["step"],
            two["rows"],
            two["tokens"],
            two["lr"],
        )
        assert one["loss"] == pytest.approx(two["loss"], rel=0.05)


@pytest.mark.parametrize("backward", ["layerwise", "checkpointed", "plain"])
def test_memory_that_runs_out_before_the_first_update_is_retried(
    unlearn, tmp_path, monkeypatch, capsys, backward, no_gpu
):
    """In float32 on a CPU, where smaller pieces change the order of a sum and nothing else."""
    change = {**SMALL, "dtype": "float32", "backward": backward}
    unlearn(tmp_path / "whole", change)
    original, count = trainer.batch_losses, [0]

    def failing(*arguments):
        count[0] += 1
        losses = original(*arguments)
        return {**losses, "loss": NoRoom.apply(losses["loss"])} if count[0] == 3 else losses

    monkeypatch.setattr(trainer, "batch_losses", failing)
    unlearn(tmp_path / "out", change)
    assert capsys.readouterr().err.count("ran out behind step 2") == 1
    one, two = weights(tmp_path / "out"), weights(tmp_path / "whole")
    start = max((one[name] - two[name]).abs().max().item() for name in one)
    assert start < 1e-3 and len(metrics(tmp_path / "out")) == 10


@pytest.mark.parametrize("every", [2, 0])
def test_memory_that_runs_out_in_the_middle_of_an_update_goes_back_to_where_the_weights_were_whole(
    unlearn, tmp_path, monkeypatch, capsys, every
):
    """With saves to the last one, without to the beginning; with a run killed behind it, it resumes to the bit."""

    def touch(walk, complete):
        complete(walk.lm.head)  # the head is a step ahead of the layers

    def run(out, **options):
        with monkeypatch.context() as patch:
            fail(patch, layerwise.LayerPass, "backward", {7}, touch)  # the first is a check before training
            return unlearn(out, save_every=every, **options)

    found = run(tmp_path / "out")
    said = capsys.readouterr().err
    assert "ran out behind step 5: going on with the head in chunks of" in said
    assert found["steps"] == 10 and [line["step"] for line in metrics(tmp_path / "out")] == list(range(1, 11))
    if not every:
        # From the beginning, in smaller pieces: as a run that began with them.
        original = trainer.Trainer.load_state

        def smaller(self, state):
            state.head_chunk = int(said.split("chunks of ")[1].split()[0])
            original(self, state)

        monkeypatch.setattr(trainer.Trainer, "go_on", smaller)
        unlearn(tmp_path / "small")
        assert result(tmp_path / "small") == result(tmp_path / "out")
        return
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 8)
        run(tmp_path / "two")
    unlearn(tmp_path / "two", resume=True)
    assert result(tmp_path / "two") == result(tmp_path / "out")


def test_a_row_that_does_not_fit_is_one_sentence_and_the_save_stays(unlearn, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        fail(patch, trainer, "batch_losses", set(range(4, 1000)))
        with pytest.raises(NekoLeanError, match=r"single row: .*as of step 2: continue with --resume\.$"):
            unlearn(out, save_every=2)
    assert steps_saved(out) == [2] and not out.exists()
    # What helps may be given to the resume.
    assert unlearn(out, {**SMALL, "offload_activations": True}, resume=True)["steps"] == 10
    assert FEW_ROWS > 1


def test_memory_that_runs_out_in_an_evaluation_or_while_loading(unlearn, tmp_path, monkeypatch):
    fail(monkeypatch, trainer, "answers", {1, 2, 5})
    run = unlearn(tmp_path / "out", LOOKING)
    assert run["steps"] == 10 and sum("eval_quality" in line for line in metrics(tmp_path / "out")) == 5
    fail(monkeypatch, runs, "load_model", {1})
    with pytest.raises(NekoLeanError, match="does not hold the model and Adam's state"):
        unlearn(tmp_path / "no")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


# What is not finite


def spoil(monkeypatch, at, words):
    """Let the gradient of a parameter in whose name `words` is found be infinite at step `at`."""
    original = optim.refuse_not_finite
    seen = []

    def spoiled(name, gradient):
        if words in name:
            seen.append(name)
            if len(seen) == at:
                gradient.view(-1)[3] = torch.inf
        original(name, gradient)

    monkeypatch.setattr(optim, "refuse_not_finite", spoiled)


@pytest.mark.parametrize("backward", ["layerwise", "checkpointed", "plain"])
@pytest.mark.parametrize("kept", ["best", "save", "nothing"])
def test_a_gradient_that_is_not_finite_never_ends_in_torn_weights(unlearn, tmp_path, monkeypatch, backward, kept):
    """The embedding's is the last to come: all other weights are a step ahead by then."""
    change = {**(LOOKING if kept == "best" else SMALL), "backward": backward}
    out = tmp_path / "out"
    wanted = save_of(unlearn, tmp_path / "whole", 4, change)
    spoil(monkeypatch, 6, "embed_tokens")
    every = 0 if kept == "nothing" else 2
    end = {"best": "holds the checkpoint of step", "save": "holds the checkpoint of step 4", "nothing": "was written"}
    said = rf"gradient of .*embed_tokens.* is not finite at step 6, in the middle of its update; .*{end[kept]}"
    with pytest.raises(NekoLeanError, match=said):
        unlearn(out, change, save_every=every)
    assert not saved(out).exists()
    if kept == "nothing":
        assert not out.exists()
        return
    run = json.loads((out / "run.json").read_text())
    found = weights(out)
    assert run["weights_of_step"] in ((2, 4) if kept == "best" else (4,)) and run["steps"] == 5
    assert all(torch.isfinite(one).all() for one in found.values())
    if run["weights_of_step"] == 4:
        assert all(torch.equal(found[name], one) for name, one in wanted.items())


def test_what_the_loss_sends_back_is_looked_at_before_anything_is_stepped(unlearn, tmp_path, monkeypatch):
    original, count, touched = trainer.batch_losses, [0], []

    class Infinite(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.inf

    def spoiled(hidden, *arguments):
        count[0] += 1
        return original(Infinite.apply(hidden) if count[0] == 3 else hidden, *arguments)

    update = optim.InBackwardAdam8bit.update
    monkeypatch.setattr(trainer, "batch_losses", spoiled)
    monkeypatch.setattr(optim.InBackwardAdam8bit, "update", lambda *a: touched.append(count[0]) or update(*a))
    with pytest.raises(NekoLeanError, match="last layer's output is not finite at step 3, before its update"):
        unlearn(tmp_path / "out")
    assert set(touched) == {1, 2}


# Disk full


def full(monkeypatch, at):
    """Let the disk be full when file number `at` of the saves is written."""
    original, count = checkpoints.save_file, [0]

    def failing(tensors, path):
        count[0] += 1
        if count[0] == at:
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", failing)


def test_a_full_disk_keeps_the_last_save_and_ends_in_one_sentence(unlearn, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        full(patch, 6)  # the second of two files of the third save
        with pytest.raises(NekoLeanError, match=r"^No space left .*as of step 4: continue with --resume\.$"):
            unlearn(out, save_every=2)
    assert steps_saved(out) == [2, 4] and not list(saved(out).glob(".step*"))
    unlearn(out, resume=True, save_every=2)
    unlearn(tmp_path / "whole")
    assert result(out) == result(tmp_path / "whole")


def test_a_full_disk_before_the_first_save_leaves_nothing(unlearn, tmp_path, monkeypatch):
    full(monkeypatch, 1)
    with pytest.raises(NekoLeanError, match=r"^No space left"):
        unlearn(tmp_path / "out", save_every=2)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_for_the_metrics_too(unlearn, tmp_path, monkeypatch):
    def dumps(line, **options):
        if line["step"] == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return json.dumps(line, **options)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "json", type("Full", (), {"dumps": staticmethod(dumps)}))
        with pytest.raises(NekoLeanError, match=r"^No space left .*as of step 4: continue with --resume\.$"):
            unlearn(out, save_every=2)
    unlearn(out, resume=True)
    unlearn(tmp_path / "whole")
    assert result(out) == result(tmp_path / "whole")


def test_a_disk_that_really_is_full(unlearn, tmp_path):
    """On a file system that holds two saves and not three."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(one.numel() * (2 + 3) for one in save_of(unlearn, tmp_path / "probe", 2).values())
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(size * 2.5)}", "none", disk], check=False)
    if mounted.returncode:
        pytest.skip("no right to mount a file system here")
    try:
        with pytest.raises(NekoLeanError, match=r"^No space left .*as of step [24]: continue with --resume"):
            unlearn(disk / "out", save_every=2)
        subprocess.run(["mount", "-o", f"remount,size={size * 20}", disk], check=True)
        unlearn(disk / "out", save_every=2, resume=True)
        unlearn(tmp_path / "whole")
        assert result(disk / "out") == result(tmp_path / "whole")
    finally:
        subprocess.run(["umount", disk], check=True)


# Damage


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture(scope="module")
def broken(world, model, cache, tmp_path_factory):
    """A run that was killed behind two saves, and how it ends."""
    folder = tmp_path_factory.mktemp("broken")
    given = {"cache": cache, "recipe": "neko", "overrides": LOOKING, "seed": 3, "quiet": True}
    flat(neko_lean.unlearn)(model, folder / "whole", world, world, **given)
    patch = pytest.MonkeyPatch()
    with patch.context() as patched, pytest.raises(Killed):
        kill_at(patched, 7)
        flat(neko_lean.unlearn)(model, folder / "out", world, world, save_every=3, **given)
    return folder


@pytest.mark.parametrize("harm", [flip, halve, lambda path: path.unlink()], ids=["flipped", "cut", "missing"])
@pytest.mark.parametrize("file", ["weights-000.safetensors", "state.json", "metrics.jsonl", "manifest.json", "best"])
def test_a_damaged_save_is_found_and_the_one_before_it_used(unlearn, broken, tmp_path, capsys, harm, file):
    shutil.copytree(saved(broken / "out"), saved(tmp_path / "out"))
    save = saved(tmp_path / "out") / "step-00000006"
    best = saved(tmp_path / "out") / f"best-{checkpoints.best_step(save):08d}"
    alone = best.name != f"best-{checkpoints.best_step(save.with_name('step-00000003')):08d}"
    harm(best / "model.safetensors" if file == "best" else save / file)
    unlearn(tmp_path / "out", LOOKING, resume=True, quiet=False)
    said = capsys.readouterr().err
    assert f"{save} is damaged (" in said and "continuing from the save before it" in said
    # A best checkpoint that both saves count theirs takes both with it.
    assert ("going on from step 3" if alone or file != "best" else "going on from step 0") in said
    assert result(tmp_path / "out") == result(broken / "whole")


def test_with_both_saves_damaged_it_starts_from_the_beginning(unlearn, broken, tmp_path, capsys):
    shutil.copytree(saved(broken / "out"), saved(tmp_path / "out"))
    for save in saved(tmp_path / "out").glob("step-*"):
        flip(save / "state-000.safetensors")
    unlearn(tmp_path / "out", LOOKING, resume=True, quiet=False)
    said = capsys.readouterr().err
    assert said.count("was changed") == 2 and "no other is left" in said and "nothing was saved" in said
    assert result(tmp_path / "out") == result(broken / "whole")


def other_format(save):
    """As a later version might write it, with all checksums right."""
    state = json.loads((save / "state.json").read_text()) | {"format_version": 2, "versions": {"neko-lean": "9.9"}}
    (save / "state.json").write_text(json.dumps(state))
    (save / "manifest.json").unlink()
    checkpoints.seal(save)


def other_manifest(save):
    """Of a later version that signs its manifests in another way."""
    state = json.loads((save / "state.json").read_text()) | {"format_version": 2}
    (save / "state.json").write_text(json.dumps(state))
    (save / "manifest.json").write_text('{"signature": "abc"}')


def other_state(save):
    """Of a version with the same number but one key more."""
    state = json.loads((save / "state.json").read_text())
    state["state"]["mood"] = 1
    (save / "state.json").write_text(json.dumps(state))
    (save / "manifest.json").unlink()
    checkpoints.seal(save)


@pytest.mark.parametrize("change", [other_format, other_manifest, other_state])
def test_a_save_of_another_version_is_no_damage_and_stays(unlearn, broken, tmp_path, change):
    shutil.copytree(saved(broken / "out"), saved(tmp_path / "out"))
    change(saved(tmp_path / "out") / "step-00000006")
    before = {path: path.stat().st_size for path in saved(tmp_path / "out").rglob("*")}
    words = "written by another version" if change is other_state else "format version 2, written by neko-lean"
    with pytest.raises(NekoLeanError, match=words):
        unlearn(tmp_path / "out", LOOKING, resume=True)
    assert {path: path.stat().st_size for path in saved(tmp_path / "out").rglob("*")} == before


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE, errno.EMFILE])
def test_a_save_that_the_disk_does_not_give_is_no_damage_and_stays(unlearn, broken, tmp_path, monkeypatch, number):
    shutil.copytree(saved(broken / "out"), saved(tmp_path / "out"))
    read = checkpoints.file_sha256

    def failing(path):
        if path.name == "weights-000.safetensors" and "step-00000006" in str(path):
            raise OSError(number, "the disk's own words", str(path))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "file_sha256", failing)
        with pytest.raises(NekoLeanError, match=r"the disk's own words.*mend that and run again"):
            unlearn(tmp_path / "out", LOOKING, resume=True)
    assert steps_saved(tmp_path / "out") == [3, 6]
    unlearn(tmp_path / "out", LOOKING, resume=True)
    assert result(tmp_path / "out") == result(broken / "whole")


def test_a_damaged_save_is_moved_aside_not_removed(unlearn, broken, tmp_path, monkeypatch):
    shutil.copytree(saved(broken / "out"), saved(tmp_path / "out"))
    flip(saved(tmp_path / "out") / "step-00000006" / "state-000.safetensors")
    for number in range(2):  # the second time its name is taken
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, 7)
            unlearn(tmp_path / "out", LOOKING, resume=True, save_every=3)
        if number == 0:
            flip(saved(tmp_path / "out") / "step-00000006" / "state-000.safetensors")
    names = sorted(path.name for path in saved(tmp_path / "out").glob("damaged-*"))
    assert names == ["damaged-step-00000006", "damaged-step-00000006-2"]
    unlearn(tmp_path / "out", LOOKING, resume=True)
    assert result(tmp_path / "out") == result(broken / "whole")

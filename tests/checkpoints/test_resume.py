"""A run that was cut off and goes on ends in the same bytes as one that was not; what it goes on from, and what not."""

import errno
import json
import os
import signal
import threading
from dataclasses import asdict

import pytest
import torch

import neko_lean
from neko_lean.checkpoints import run_folder as unfinished
from neko_lean.checkpoints import signals
from neko_lean.errors import NekoLeanError
from neko_lean.jsonio import write_jsonl
from neko_lean.outputs.place import claim_folder
from neko_lean.outputs.signing import file_sha256
from neko_lean.training import loop
from tests.helpers import SMALL, make_cache, make_rows, random_model, write_rows

LOOKING = {**SMALL, "eval_every": 2, "choose": "quality"}
TIMES = ("wait_seconds", "seconds", "peak_memory")


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def kill_at(monkeypatch, step):
    """Let the process die before its step `step`."""
    original = loop.Loop._step

    def dying(self, *arguments):
        if self.state.step + 1 == step:
            raise Killed
        return original(self, *arguments)

    monkeypatch.setattr(loop.Loop, "_step", dying)


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def result(out):
    """All that has to be the same."""
    run = json.loads((out / "run.json").read_text())
    told = {key: run[key] for key in ("steps", "weights_of_step", "ended", "padding", "made_from", "predicted_peak")}
    files = {f.name: file_sha256(f) for f in out.iterdir() if f.name not in ("run.json", "metrics.jsonl")}
    return files, metrics(out), told


def saved(out):
    return out.parent / f".{out.name}.saved"


def steps_saved(out):
    return sorted(int(path.name[5:]) for path in saved(out).glob("step-*"))


@pytest.fixture(scope="module")
def anchored(world, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("anchored")
    texts = [f"The {word} stood in the field and nobody knew why." for word in ("tree", "house", "old barn", "well")]
    write_jsonl(folder / "anchor.jsonl", ({"document": text} for text in texts))
    make_cache(model, world, folder / "cache", anchor=folder / "anchor.jsonl", format="plain")
    return folder


DROPOUT = {"attention_dropout": 0.2}
CASES = {
    "layerwise, chosen by quality": ("neko", LOOKING, {}),
    "layerwise, state on the host": ("neko", {**SMALL, "offload_state": True, "offload_activations": True}, {}),
    "layerwise, clipped, float32": ("neko", {**SMALL, "clip": 0.5, "dtype": "float32", "train_last": 1}, {}),
    "layerwise, 4-bit state": ("neko", {**SMALL, "state_bits": 4}, {}),
    "checkpointed, dropout, early stopping": (
        "neko",
        {**LOOKING, "backward": "checkpointed", "dropout": True, "patience": 2, "lr": 1e-2, "max_steps": 30},
        DROPOUT,
    ),
    "plain, dropout": ("neko", {**SMALL, "backward": "plain", "dropout": True}, DROPOUT),
    "chunks": ("sequential", {"chunk_rows": 8, "epochs": 1.0, "forget_rows": 2, "retain_rows": 4}, {}),
    "chunks, plain": ("sequential", {"max_steps": 9, "chunk_rows": 8, "epochs": 1.0, "backward": "plain"}, {}),
    "alternating": ("alternating", {**SMALL, "forget_rows": 3}, {}),
    "calibrated": ("calibrated", {**LOOKING, "retain_rows": 12}, {}),
    "memorize": ("memorize", {**SMALL, "backward": "plain", "dropout": True}, DROPOUT),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_cut_off_twice_ends_in_the_same_bytes(world, model, cache, anchored, tmp_path, monkeypatch, name):
    recipe, change, config = CASES[name]
    if change.get("state_bits") == 4:
        pytest.importorskip("torchao")
    if config:
        folder = random_model(world, tmp_path / "model", scale=20.0)
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(written | config))
        model = folder
    more = {"cache": cache}
    if recipe in ("calibrated", "sequential", "alternating"):
        more = {"cache": anchored / "cache", "anchor": anchored / "anchor.jsonl"}
    if recipe == "sequential":  # asks no teacher
        del more["cache"]

    def run(out, **options):
        common = {"recipe": recipe, "overrides": change, "seed": 3, "quiet": True, **options}
        if recipe == "memorize":
            return neko_lean.memorize(model, world, out, **common)
        return neko_lean.unlearn(model, out, world, world, **more, **common)

    whole = run(tmp_path / "whole")
    assert not saved(tmp_path / "whole").exists()
    steps = whole["steps"]
    assert whole["ended"].startswith("early stopping") or "early stopping" not in name
    out = tmp_path / "out"
    for number, step in enumerate((steps // 2 + 1, steps)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, step)
            run(out, save_every=2, resume=number > 0)
        assert not out.exists() and steps_saved(out)[-1] == (step - 1) // 2 * 2 and len(steps_saved(out)) <= 2
        assert not list(saved(out).rglob("*.pt")) and not list(saved(out).rglob("*.pkl"))
    again = run(out, resume=True)
    assert result(out) == result(tmp_path / "whole")
    assert again["wait_seconds"] == pytest.approx(
        sum(json.loads(line)["wait_seconds"] for line in (out / "metrics.jsonl").read_text().splitlines())
    )
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_time_before_the_cut_counts(unlearn, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 3)
        unlearn(tmp_path / "out", save_every=2)
    file = saved(tmp_path / "out") / "step-00000002" / "state.json"
    state = json.loads(file.read_text())["state"]
    assert state["wall"] > 0 and state["peak"]["process"] > 2**20
    monkeypatch.setattr(loop.Loop, "_restore", slower(loop.Loop._restore, 1000.0))
    assert unlearn(tmp_path / "out", resume=True)["wall_seconds"] > 1000


def slower(original, seconds):
    def restore(self, save, torn=None):
        save.state.wall += seconds
        original(self, save, torn)

    return restore


def test_resume_refuses_another_run_and_names_what_differs(world, model, cache, unlearn, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 4)
        unlearn(out, save_every=2)
    other = random_model(world, tmp_path / "other", seed=5)
    make_cache(other, world, tmp_path / "others", dtype="float32", format="neko")
    make_cache(model, world, tmp_path / "wide", dtype="float32", format="neko", top_k=16)
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    write_rows(fewer / "forget.jsonl", make_rows("Foo", 3))
    cases = [
        ({"seed": 4}, r"another seed \(3, now 4\):"),
        ({"change": {**SMALL, "lr": 3e-3}}, r"another recipe value lr \(0.002, now 0.003\):"),
        ({"model": other, "cache": tmp_path / "others"}, "another cache, model:"),
        ({"cache": tmp_path / "wide"}, "another cache:"),
    ]
    for options, words in cases:
        with pytest.raises(NekoLeanError, match=words):
            unlearn(out, resume=True, **options)
    with pytest.raises(NekoLeanError, match="another forget rows:"):
        neko_lean.unlearn(
            model, out, fewer, world, cache=cache, recipe="neko", overrides=SMALL, seed=3, resume=True, quiet=True
        )
    with pytest.raises(NekoLeanError, match=r"keeps the run as of step 2: continue with --resume, or start anew"):
        unlearn(out)
    # Where things lie changes nothing of the result.
    unlearn(out, {**SMALL, "offload_state": True}, resume=True)
    unlearn(tmp_path / "whole")
    assert result(out) == result(tmp_path / "whole")


def test_overwrite_starts_anew_and_resume_with_nothing_saved_says_so(unlearn, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 4)
        unlearn(out, save_every=2)
    unlearn(out, overwrite=True, seed=4)
    assert not saved(out).exists() and json.loads((out / "run.json").read_text())["seed"] == 4
    unlearn(tmp_path / "two", resume=True, quiet=False)
    assert "nothing was saved: going on from step 0" in capsys.readouterr().err
    # A complete output of the same run needs nothing; another's is in the way.
    before = file_sha256(tmp_path / "two" / "run.json")
    assert unlearn(tmp_path / "two", resume=True)["steps"] == 10
    assert file_sha256(tmp_path / "two" / "run.json") == before
    with pytest.raises(NekoLeanError, match="already holds something"):
        unlearn(out, resume=True)


def test_a_cache_of_its_own_is_kept_for_the_resume(unlearn, tmp_path, monkeypatch):
    options = {"cache": None}
    unlearn(tmp_path / "whole", **options)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 2)
        unlearn(tmp_path / "out", **options)
    assert (saved(tmp_path / "out") / "cache" / "manifest.json").is_file()
    monkeypatch.setattr("neko_lean.cache.writer._write_shards", None)  # it would have to be called
    unlearn(tmp_path / "out", resume=True, **options)
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_a_signal_while_the_teacher_is_cached_keeps_its_shards(unlearn, tmp_path, monkeypatch):
    from neko_lean.cache import planning, writer

    monkeypatch.setattr(planning, "SHARD_POSITIONS", 100)
    original, count = writer._top_k_tensors, [0]

    def struck(*arguments):
        count[0] += 1
        if count[0] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(neko_lean.Interrupted, match="SIGTERM at once") as raised:
        patch.setattr(writer, "_top_k_tensors", struck)
        unlearn(tmp_path / "out", {**SMALL, "batch_tokens": 256}, cache=None)
    assert raised.value.saved_state == f"{saved(tmp_path / 'out')} keeps what the teacher's cache has so far"
    unlearn(tmp_path / "out", {**SMALL, "batch_tokens": 256}, cache=None, resume=True)
    unlearn(tmp_path / "whole", {**SMALL, "batch_tokens": 256}, cache=None)
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_two_processes_cannot_write_one_output(unlearn, tmp_path):
    with (
        unfinished.open_run_folder(claim_folder(tmp_path / "out", "saved", []), {}),
        pytest.raises(NekoLeanError, match="another process is writing"),
    ):
        unlearn(tmp_path / "out", overwrite=True)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def heeded():
    """SIGINT as a terminal's program has it: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def signal_at(monkeypatch, step, *numbers):
    """Let signals arrive in the middle of a step."""
    original = loop.Loop._step

    def stepping(self, *arguments):
        if self.state.step + 1 == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        return original(self, *arguments)

    monkeypatch.setattr(loop.Loop, "_step", stepping)


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(unlearn, tmp_path, monkeypatch, number):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(neko_lean.Interrupted) as raised:
        signal_at(patch, 3, number)
        unlearn(tmp_path / "out", LOOKING)
    assert raised.value.number == number and "after step 3 of 10" in str(raised.value)
    assert raised.value.saved_state == f"{saved(tmp_path / 'out')} keeps the run as of step 3"
    assert signal.getsignal(number) == before
    assert steps_saved(tmp_path / "out") == [3] and not (tmp_path / "out").exists()
    unlearn(tmp_path / "out", LOOKING, resume=True)
    unlearn(tmp_path / "whole", LOOKING)
    assert result(tmp_path / "out") == result(tmp_path / "whole")


@pytest.mark.usefixtures("heeded")
def test_hangups_of_a_closing_terminal_do_not_stop_the_save(unlearn, tmp_path, monkeypatch):
    """Its shell sends one to each of its jobs, and the kernel another; and nothing can be written to it any more."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    monkeypatch.setattr(os, "write", lambda *args: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    try:
        with pytest.raises(neko_lean.Interrupted, match="SIGHUP after step 3 of 10") as raised:
            signal_at(monkeypatch, 3, signal.SIGHUP, signal.SIGHUP)
            unlearn(tmp_path / "out")
        assert raised.value.saved_state is not None and steps_saved(tmp_path / "out") == [3]
        with (
            signals.handle_signals() as arrived,
            pytest.raises(neko_lean.Interrupted, match="SIGTERM"),
            arrived.deferred(),
        ):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("heeded")
def test_a_second_signal_stops_at_once_and_what_is_saved_is_whole(unlearn, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(neko_lean.Interrupted, match="SIGTERM at once") as raised:
        signal_at(patch, 4, signal.SIGINT, signal.SIGTERM)
        unlearn(out, save_every=2)
    assert raised.value.saved_state is not None and steps_saved(out) == [2]
    original = unfinished.write_save

    def struck(*arguments):
        patched.setattr("neko_lean.checkpoints.seal", lambda folder: os.kill(os.getpid(), signal.SIGTERM))
        original(*arguments)

    with monkeypatch.context() as patched, pytest.raises(neko_lean.Interrupted, match="at once"):
        signal_at(patched, 4, signal.SIGINT)
        patched.setattr(unfinished, "write_save", struck)
        unlearn(out, save_every=100, resume=True)
    assert steps_saved(out) == [2] and not list(saved(out).glob(".step*"))
    unlearn(out, resume=True)
    unlearn(tmp_path / "whole")
    assert result(out) == result(tmp_path / "whole")


@pytest.mark.usefixtures("heeded")
def test_signals_wait_only_while_it_trains_and_only_in_the_main_thread():
    with signals.handle_signals() as arrived:
        with arrived.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            assert arrived.received == signal.SIGINT
        arrived.received = None
        with pytest.raises(neko_lean.Interrupted, match="SIGTERM at once"):
            os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    seen = []

    def elsewhere():
        with signals.handle_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup and shells do for what runs in the background
    with signals.handle_signals():
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_large_tensors_are_saved_in_pieces(tmp_path, monkeypatch):
    from neko_lean import checkpoints

    monkeypatch.setattr(checkpoints, "PIECE", 100)
    tensors = {f"t{n}": torch.full((n,), float(n)) for n in (1, 20, 30, 3, 2)}
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    about = {"identity": {}, "versions": {}}
    checkpoints.write_save(
        tmp_path / "s", tensors, {}, about, checkpoints.RunState(7, step=5), tmp_path / "metrics.jsonl"
    )
    save = checkpoints.read_save(tmp_path / "s")
    assert asdict(save.state) == asdict(checkpoints.RunState(7, step=5))
    assert len(list((tmp_path / "s").glob("weights-*"))) == 3
    found = save.tensors("weights")
    assert set(found) == set(tensors) and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert len(save.tensors("state")) == 0

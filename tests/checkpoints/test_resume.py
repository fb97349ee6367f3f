"""Interrupted runs that resume: they end in the same bytes as uninterrupted ones, or are refused."""

import errno
import json
import os
import signal

import pytest

import neko_lean
from neko_lean.checkpoints import run_folder, signals
from neko_lean.errors import NekoLeanError
from neko_lean.jsonio import write_jsonl
from neko_lean.options import RunOptions
from neko_lean.outputs.signing import file_sha256
from neko_lean.training.checkpointing import Checkpointer
from tests.checkpoints.interrupted import EVALUATED, Killed, kill_at, result, saved, signal_at, steps_saved
from tests.helpers import SMALL, flat, make_cache, make_rows, random_model, write_rows

pytestmark = pytest.mark.slow  # each test is one or more whole runs


@pytest.fixture(scope="module")
def anchored(world, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("anchored")
    texts = [f"The {word} stood in the field and nobody knew why." for word in ("tree", "house", "old barn", "well")]
    write_jsonl(folder / "anchor.jsonl", ({"document": text} for text in texts))
    make_cache(model, world, folder / "cache", anchor=folder / "anchor.jsonl", format="plain", quiet=True)
    return folder


DROPOUT = {"attention_dropout": 0.2}
CASES = {
    "layerwise, chosen by quality": ("neko", EVALUATED, {}),
    "layerwise, state on the host": ("neko", {**SMALL, "offload_state": True, "offload_activations": True}, {}),
    "layerwise, clipped, float32": ("neko", {**SMALL, "clip": 0.5, "dtype": "float32", "train_last": 1}, {}),
    "layerwise, 4-bit state": ("neko", {**SMALL, "state_bits": 4}, {}),
    "checkpointed, dropout, early stopping": (
        "neko",
        {**EVALUATED, "backward": "checkpointed", "dropout": True, "patience": 2, "lr": 1e-2, "max_steps": 30},
        DROPOUT,
    ),
    "plain, dropout": ("neko", {**SMALL, "backward": "plain", "dropout": True}, DROPOUT),
    "chunks": ("sequential", {"chunk_rows": 8, "epochs": 1.0, "forget_rows": 2, "retain_rows": 4}, {}),
    "chunks, plain": ("sequential", {"max_steps": 9, "chunk_rows": 8, "epochs": 1.0, "backward": "plain"}, {}),
    "alternating": ("alternating", {**SMALL, "forget_rows": 3}, {}),
    "calibrated": ("calibrated", {**EVALUATED, "retain_rows": 12, "stop": "steps"}, {}),
    "calibrated, until forgotten": (
        "calibrated",
        {**SMALL, "retain_rows": 12, "stop": "forgotten", "eval_every": 8, "max_steps": 30},
        {},
    ),
    "memorize": ("memorize", {**SMALL, "backward": "plain", "dropout": True}, DROPOUT),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_is_killed_twice_ends_in_the_same_bytes(world, model, cache, anchored, tmp_path, monkeypatch, name):
    recipe, change, config = CASES[name]
    if change.get("state_bits") == 4:
        pytest.importorskip("torchao")
    if config:
        folder = random_model(world, tmp_path / "model", scale=20.0)
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(written | config))
        model = folder
    inputs = {"cache": cache}
    if recipe in ("calibrated", "sequential", "alternating"):
        inputs = {"cache": anchored / "cache", "anchor": anchored / "anchor.jsonl"}
    if recipe == "sequential":  # needs no teacher
        del inputs["cache"]

    def run(out, **options):
        common = {"recipe": recipe, "overrides": change, "seed": 3, "quiet": True, **options}
        if recipe == "memorize":
            return flat(neko_lean.memorize)(model, out, data=world, **common)
        return flat(neko_lean.unlearn)(model, out, forget=world, retain=world, **inputs, **common)

    whole = run(tmp_path / "whole")
    assert not saved(tmp_path / "whole").exists()
    steps = whole["steps"]
    assert whole["ended"].startswith("early stopping") or "early stopping" not in name
    assert (whole["forgotten_step"] is not None) == ("until forgotten" in name)
    out = tmp_path / "out"
    for number, step in enumerate((steps // 2 + 1, steps)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, step)
            run(out, save_every=2, resume=number > 0)
        assert not out.exists() and steps_saved(out)[-1] == (step - 1) // 2 * 2 and len(steps_saved(out)) <= 2
        assert not list(saved(out).rglob("*.pt")) and not list(saved(out).rglob("*.pkl"))
    resumed = run(out, resume=True)
    assert result(out) == result(tmp_path / "whole")
    assert resumed["wait_seconds"] == pytest.approx(
        sum(json.loads(line)["wait_seconds"] for line in (out / "metrics.jsonl").read_text().splitlines())
    )
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_time_before_an_interruption_counts(unlearn, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 3)
        unlearn(tmp_path / "out", save_every=2)
    file = saved(tmp_path / "out") / "step-00000002" / "state.json"
    state = json.loads(file.read_text())["state"]
    assert state["wall"] > 0 and state["measured_peak"] > 2**20
    original = Checkpointer.restore

    def slower(self, save, partial=None):
        save.state.wall += 1000.0
        original(self, save, partial)

    monkeypatch.setattr(Checkpointer, "restore", slower)
    assert unlearn(tmp_path / "out", resume=True)["wall_seconds"] > 1000


def test_resume_refuses_another_run_and_names_what_differs(world, model, cache, unlearn, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 4)
        unlearn(out, save_every=2)
    other = random_model(world, tmp_path / "other", seed=5)
    make_cache(other, world, tmp_path / "others", dtype="float32", format="neko", quiet=True)
    make_cache(model, world, tmp_path / "wide", dtype="float32", format="neko", top_k=16, quiet=True)
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    write_rows(fewer / "forget.jsonl", make_rows("Foo", 3))
    cases = [
        ({"seed": 4}, r"another seed \(3, now 4\);"),
        ({"overrides": {**SMALL, "lr": 3e-3}}, r"another recipe value lr \(0.002, now 0.003\);"),
        ({"model": other, "cache": tmp_path / "others"}, "another cache, model;"),
        ({"cache": tmp_path / "wide"}, "another cache;"),
    ]
    for options, words in cases:
        with pytest.raises(NekoLeanError, match=words):
            unlearn(out, resume=True, **options)
    with pytest.raises(NekoLeanError, match="another forget rows;"):
        neko_lean.unlearn(
            model,
            out,
            forget=fewer,
            retain=world,
            cache=cache,
            recipe="neko",
            overrides=SMALL,
            run=RunOptions(seed=3, resume=True, quiet=True),
        )
    with pytest.raises(NekoLeanError, match=r"keeps the run as of step 2: continue with --resume, or start anew"):
        unlearn(out)
    # Where tensors are stored does not change the result.
    unlearn(out, {**SMALL, "offload_state": True}, resume=True)
    unlearn(tmp_path / "whole")
    assert result(out) == result(tmp_path / "whole")


def test_overwrite_starts_anew_and_resume_without_a_save_says_so(unlearn, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 4)
        unlearn(out, save_every=2)
    unlearn(out, overwrite=True, seed=4)
    assert not saved(out).exists() and json.loads((out / "run.json").read_text())["seed"] == 4
    unlearn(tmp_path / "two", resume=True, quiet=False)
    assert "there is no save; starting from step 0" in capsys.readouterr().err
    # The complete output of the same run is left unchanged; that of another run is refused.
    before = file_sha256(tmp_path / "two" / "run.json")
    assert unlearn(tmp_path / "two", resume=True)["steps"] == 10
    assert file_sha256(tmp_path / "two" / "run.json") == before
    with pytest.raises(NekoLeanError, match="already holds something"):
        unlearn(out, resume=True)


def test_the_runs_own_teacher_cache_is_kept_for_resume(unlearn, tmp_path, monkeypatch):
    options = {"cache": None}
    unlearn(tmp_path / "whole", **options)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 2)
        unlearn(tmp_path / "out", **options)
    assert (saved(tmp_path / "out") / "cache" / "manifest.json").is_file()
    monkeypatch.setattr("neko_lean.cache.writer._write_shards", None)  # an error if it is called
    unlearn(tmp_path / "out", resume=True, **options)
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_a_signal_during_caching_keeps_the_shards(unlearn, tmp_path, monkeypatch):
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


@pytest.fixture
def default_sigint():
    """SIGINT as in a program that a terminal runs; a process that a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_sigint")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(unlearn, tmp_path, monkeypatch, number):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(neko_lean.Interrupted) as raised:
        signal_at(patch, 3, number)
        unlearn(tmp_path / "out", EVALUATED)
    assert raised.value.number == number and "after step 3 of 10" in str(raised.value)
    assert raised.value.saved_state == f"{saved(tmp_path / 'out')} keeps the run as of step 3"
    assert signal.getsignal(number) == before
    assert steps_saved(tmp_path / "out") == [3] and not (tmp_path / "out").exists()
    unlearn(tmp_path / "out", EVALUATED, resume=True)
    unlearn(tmp_path / "whole", EVALUATED)
    assert result(tmp_path / "out") == result(tmp_path / "whole")


@pytest.mark.usefixtures("default_sigint")
def test_hangups_of_a_closing_terminal_do_not_prevent_the_save(unlearn, tmp_path, monkeypatch):
    """The shell and the kernel both send a SIGHUP, and nothing can be written to the terminal any more."""
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


@pytest.mark.usefixtures("default_sigint")
def test_a_second_signal_stops_at_once_and_leaves_intact_saves(unlearn, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(neko_lean.Interrupted, match="SIGTERM at once") as raised:
        signal_at(patch, 4, signal.SIGINT, signal.SIGTERM)
        unlearn(out, save_every=2)
    assert raised.value.saved_state is not None and steps_saved(out) == [2]
    original = run_folder.write_save

    def struck(*arguments):
        patched.setattr("neko_lean.checkpoints.saves.seal", lambda folder: os.kill(os.getpid(), signal.SIGTERM))
        original(*arguments)

    with monkeypatch.context() as patched, pytest.raises(neko_lean.Interrupted, match="at once"):
        signal_at(patched, 4, signal.SIGINT)
        patched.setattr(run_folder, "write_save", struck)
        unlearn(out, save_every=100, resume=True)
    assert steps_saved(out) == [2] and not list(saved(out).glob(".step*"))
    unlearn(out, resume=True)
    unlearn(tmp_path / "whole")
    assert result(out) == result(tmp_path / "whole")


@pytest.mark.cuda
@pytest.mark.parametrize("change", [{"offload_state": True}, {"backward": "plain", "dropout": True}])
def test_a_run_on_a_gpu_that_is_killed_ends_in_the_same_bytes(unlearn, tmp_path, monkeypatch, change):
    change = {**SMALL, **change}
    unlearn(tmp_path / "whole", change, device="cuda")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 8)
        unlearn(tmp_path / "killed", change, save_every=3, device="cuda")
    unlearn(tmp_path / "killed", change, save_every=3, resume=True, device="cuda")
    assert result(tmp_path / "killed") == result(tmp_path / "whole")

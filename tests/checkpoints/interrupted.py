"""Runs that are interrupted, and how their results are compared with those of uninterrupted runs."""

import json
import os
import shutil

import pytest

from neko_lean.checkpoints.saves import read_save
from neko_lean.outputs.signing import file_sha256
from neko_lean.training import loop
from tests.helpers import SMALL

EVALUATED = {**SMALL, "eval_every": 2, "choose": "quality"}
TIMES = ("wait_seconds", "seconds", "measured_peak")


class Killed(BaseException):
    """Stands for SIGKILL: no handler in the package catches it."""


def kill_at(monkeypatch, step):
    """Let the process die before its step `step`."""
    original = loop.Loop._step

    def dying(self, *arguments):
        if self.state.step + 1 == step:
            raise Killed
        return original(self, *arguments)

    monkeypatch.setattr(loop.Loop, "_step", dying)


def signal_at(monkeypatch, step, *numbers):
    """Let signals arrive in the middle of a step."""
    original = loop.Loop._step

    def stepping(self, *arguments):
        if self.state.step + 1 == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        return original(self, *arguments)

    monkeypatch.setattr(loop.Loop, "_step", stepping)


def metrics(folder):
    """The lines of metrics.jsonl, without times and memory."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def result(out):
    """Everything that has to be the same in two runs."""
    run = json.loads((out / "run.json").read_text())
    keys = ("steps", "weights_of_step", "ended", "padding", "made_from", "predicted_peak")
    files = {f.name: file_sha256(f) for f in out.iterdir() if f.name not in ("run.json", "metrics.jsonl")}
    return files, metrics(out), {key: run[key] for key in keys}


def saved(out):
    """The work folder of the run that writes `out`."""
    return out.parent / f".{out.name}.saved"


def steps_saved(out):
    """Steps of the saves that exist."""
    return sorted(int(path.name[5:]) for path in saved(out).glob("step-*"))


def save_of(unlearn, out, step, change=SMALL):
    """Weights of the save after `step` of an uninterrupted run."""
    patch = pytest.MonkeyPatch()
    with patch.context() as patched, pytest.raises(Killed):
        kill_at(patched, step + 1)
        unlearn(out, change, save_every=step)
    tensors = dict(read_save(saved(out) / f"step-{step:08d}").tensors("weights"))
    shutil.rmtree(saved(out))
    return tensors

"""Experiment trackers get the metrics of every step."""

import importlib.machinery
import sys
import types

import pytest

from neko_lean.errors import NekoLeanError
from neko_lean.runs.trackers import check_tracker, flat_metrics, tracked


class Tracker(types.ModuleType):
    """A stand-in for trackio and wandb that records the calls."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.calls = []

    def init(self, **options):
        self.calls.append(("init", options))
        return self

    def log(self, metrics, step):
        self.calls.append((step, metrics))

    def finish(self):
        self.calls.append("finish")


@pytest.fixture(params=["trackio", "wandb"])
def tracker(request, monkeypatch):
    module = Tracker(request.param)
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def test_metrics_of_a_step(tracker, monkeypatch):
    monkeypatch.setenv(f"{tracker.__name__.upper()}_PROJECT", "letters")
    check_tracker(tracker.__name__)
    with tracked(tracker.__name__, "out", {"lr": 0.1}) as callback:
        callback(3, {"step": 3, "loss": 0.5, "note": "x", "peak_memory": {"process": 7}})
    (_, options), logged, end = tracker.calls
    assert options.get("resume", "never") == "never"
    assert options["project"] == "letters" and options["name"] == "out" and options["config"] == {"lr": 0.1}
    assert logged == (3, {"loss": 0.5, "peak_memory/process": 7}) and end == "finish"


def test_the_run_ends_with_an_error(tracker):
    with pytest.raises(KeyError), tracked(tracker.__name__, "out", {}):
        raise KeyError
    assert tracker.calls[-1] == "finish"


def test_a_tracker_that_does_not_start(tracker):
    tracker.init = lambda **options: 1 / 0
    with pytest.raises(NekoLeanError, match="cannot be started"), tracked(tracker.__name__, "out", {}):
        pass


def test_tensorboard(monkeypatch, tmp_path):
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            written.append(folder)

        def add_text(self, name, text):
            written.append((name, text.strip()))

        def add_scalar(self, key, value, step):
            written.append((key, value, step))

        def close(self):
            written.append("close")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    with tracked("tensorboard", "out", {"lr": 0.1}) as callback:
        callback(1, {"loss": 2.0})
    assert written == [str(tmp_path), ("recipe", "lr = 0.1"), ("loss", 2.0, 1), "close"]


def test_no_tracker():
    check_tracker(None)
    with tracked(None, "out", {}) as callback:
        assert callback is None


def test_refused(monkeypatch):
    with pytest.raises(NekoLeanError, match="did you mean 'wandb'"):
        check_tracker("wanbd")
    monkeypatch.setattr("neko_lean.runs.trackers.find_spec", lambda name: None)
    with pytest.raises(NekoLeanError, match="needs the package tensorboard, which is not installed: pip install"):
        check_tracker("tensorboard")


def test_only_numbers():
    assert flat_metrics({"a": 1, "b": True, "c": None, "d": {"e": 2.0, "f": "x"}}) == {"a": 1, "d/e": 2.0}


def test_a_tracker_that_fails_later_does_not_end_the_run(tracker, capsys):
    def log(metrics, step):
        tracker.calls.append(step)
        raise OSError("no network")

    tracker.log, tracker.finish = log, lambda: 1 / 0
    with tracked(tracker.__name__, "out", {}) as callback:
        callback(1, {"loss": 0.5})
        callback(2, {"loss": 0.4})
    assert tracker.calls[1:] == [1]
    warnings = capsys.readouterr().err
    assert "are incomplete, because it failed (no network)" in warnings and "division by zero" in warnings

"""A fake harness is called as documented, and its results become plain numbers."""

import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from neko_lean.distributed.ranks import world_size
from neko_lean.errors import NekoLeanError
from neko_lean.scoring.lm_eval import lm_eval_tasks

FOUND = {
    "results": {
        "arc": {"alias": "arc", "acc,none": np.float32(0.25), "acc_stderr,none": "N/A", "sample_len": np.int64(4)},
        "ppl": {"word_perplexity,none": float("inf"), "bits_per_byte,none": 2.5},
    },
    "configs": {"arc": {"doc_to_text": str}},
}


def test_results_are_plain_numbers(monkeypatch):
    calls = []
    fake = SimpleNamespace(simple_evaluate=lambda **given: calls.append(given) or FOUND)
    monkeypatch.setitem(sys.modules, "lm_eval", fake)
    found = lm_eval_tasks("a,b=c", ["arc", "ppl"], "cpu", "float32", 8)
    assert found == {"arc": {"acc,none": 0.25, "sample_len": 4.0}, "ppl": {"bits_per_byte,none": 2.5}}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    (call,) = calls
    assert call["model"] == "hf" and call["tasks"] == ["arc", "ppl"]
    assert (call["device"], call["batch_size"]) == ("cpu", 8)
    assert call["model_args"] == {"pretrained": "a,b=c", "dtype": "float32", "trust_remote_code": False}


def test_other_ranks_are_hidden_from_the_harness(monkeypatch):
    launched = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    seen = []

    def simple_evaluate(**given):
        seen.append((world_size(), [name for name in launched if name in os.environ]))
        raise KeyError("nosuch")

    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=simple_evaluate))
    with pytest.raises(NekoLeanError, match="nosuch"):
        lm_eval_tasks("m", ["x"], "cpu", "float32", 8)
    assert seen == [(1, [])]
    assert world_size() == 2 and {name: os.environ[name] for name in launched} == launched


@pytest.mark.parametrize("error", [KeyError("nosuch"), ConnectionError("no network"), ImportError("no accelerate")])
def test_errors_of_the_harness_are_one_sentence(monkeypatch, error):
    def simple_evaluate(**given):
        raise error

    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=simple_evaluate))
    with pytest.raises(NekoLeanError, match=f"lm-eval cannot run x, y: .*{error.args[0]}"):
        lm_eval_tasks("m", ["x", "y"], "cpu", "float32", 8)


def test_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(NekoLeanError, match=r"^--lm-eval needs the package lm_eval, .*'neko-lean\[lm-eval\]'\.$"):
        lm_eval_tasks("m", ["x"], "cpu", "float32", 8)

"""Runs sections of bench/gpu.py: reads a JSON request per line, answers each with a line that starts with ANSWER.

bench/gpu.py starts these processes. The imports happen before the first request, while another section runs.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu import ANSWER
from gpu_head import measure_head
from gpu_scoring import describe_machine, run_cuda_tests, score_speed
from gpu_setup import Setup
from gpu_training import largest_in_24_gb, qlora_in_24_gb, train, train_two_models

from neko_lean.errors import first_line
from neko_lean.memory.two_models import LEAN_BASELINE, PUBLISHED_BASELINE

BOTH = {"offload_state": True, "offload_activations": True}

SECTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "machine": describe_machine,
    "tests": run_cuda_tests,
    "head": measure_head,
    "score": score_speed,
    "step": train,
    "step offload_state": partial(train, offload_state=True),
    "step offload_activations": partial(train, offload_activations=True),
    "step both offloads": partial(train, **BOTH),
    "step backward=checkpointed": partial(train, backward="checkpointed"),
    "step state_bits=4": partial(train, state_bits=4),
    "step compile": partial(train, compile=True),
    "step default kernels": partial(train, default_kernels=True),
    "two bf16 models": partial(train_two_models, baseline=LEAN_BASELINE),
    "two fp32 models": partial(train_two_models, baseline=PUBLISHED_BASELINE),
    "24 GB": largest_in_24_gb,
    "24 GB both offloads": partial(largest_in_24_gb, **BOTH),
    "24 GB QLoRA": qlora_in_24_gb,
}


def run(request: dict[str, Any]) -> dict[str, Any]:
    """The result of a section, or its error."""
    setup = Setup(Path(request["folder"]), torch.device(request["device"]), request["toy"], request["seconds"])
    start = time.monotonic()
    try:
        result = SECTIONS[request["section"]](setup, **request.get("arguments", {}))
        return {**result, "took": time.monotonic() - start}
    except Exception as error:
        print(f"{request['section']}: {error!r}", file=sys.stderr, flush=True)
        name = "" if type(error).__name__ == "NekoLeanError" else f"{type(error).__name__}: "
        return {"error": name + first_line(error), "took": time.monotonic() - start}


def main() -> None:
    for line in sys.stdin:
        print(ANSWER + json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

"""A step at OLMo-1B-0724 geometry on a GPU, with and without deterministic kernels; and the teacher's forward pass.

    .venv/bin/python bench/gpu_step.py LUME --out bench-gpu-step.json

Recipe `neko` with 32 forget and 32 retain examples of LUME per step, as in bench/step.py. Both modes take turns. The
teacher's pass covers LUME's retain examples at 512 tokens, in batches of 8192 tokens, and writes no files.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from contenders import clock, prepare, step_batches, title
from torch import nn

from neko_lean.cache.planning import teacher_batches
from neko_lean.cache.teacher import top_k_entries
from neko_lean.data.examples import read_rows
from neko_lean.data.tokenization import encode
from neko_lean.models.causal_lm import CausalLM
from neko_lean.models.devices import pick_device
from neko_lean.models.loading import load_model, load_tokenizer
from neko_lean.recipe import Recipe, load_recipe
from neko_lean.training.batch import Batch
from neko_lean.training.determinism import deterministic
from neko_lean.training.layers import decoder_layers
from neko_lean.training.layerwise import LayerPass
from neko_lean.training.losses import batch_losses
from neko_lean.training.optimizer import InBackwardAdam8bit


class Stepper:
    """Takes training steps on a few batches in turn."""

    def __init__(self, lm: CausalLM, batches: Sequence[Batch], recipe: Recipe) -> None:
        self.lm, self.batches, self.recipe = lm, batches, recipe
        self.walk = LayerPass(lm, decoder_layers(lm))
        self.optimizer = InBackwardAdam8bit(lm.model.named_parameters())

    def step(self, batch: Batch, complete: Callable[[nn.Parameter], object]) -> float:
        """Run forward and backward pass, call `complete` for each parameter, and return the loss."""
        hidden = self.walk.forward(batch.micro)
        loss = batch_losses(hidden, self.lm, batch, self.recipe)["loss"]
        loss.backward()
        self.walk.backward(complete)
        return loss.item()

    def timed(self, count: int = 6) -> dict[str, float]:
        """Seconds per step, tokens per second and peak memory of `count` steps after a warm-up step."""
        device, tokens = self.lm.device, 0
        for number in range(count + 1):
            if number == 1:
                torch.cuda.reset_peak_memory_stats(device)
                start = clock(device)
            batch = self.batches[number % len(self.batches)]
            self.optimizer.begin_step(1e-6)
            self.step(batch, self.optimizer.update)
            tokens += batch.tokens if number else 0
        seconds = clock(device) - start
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return {
            "seconds": seconds / count,
            "tokens_per_second": tokens / seconds,
            "allocated": allocated,
            "reserved": reserved,
        }

    def differ(self, repeats: int = 4) -> int:
        """How many repeats of a step, without its update, differ from the first in loss or gradient."""

        def checksums() -> tuple[float, list[int]]:
            sums = []

            def complete(parameter: nn.Parameter) -> None:
                if parameter.grad is not None:
                    sums.append(int(parameter.grad.view(torch.int16).to(torch.int64).sum()))
                parameter.grad = None

            return self.step(self.batches[0], complete), sums

        first = checksums()
        return sum(checksums() != first for _ in range(repeats))


def teacher_pass(lm: CausalLM, work: Path, lume: Path) -> dict[str, Any]:
    """Tokens per second and peak memory of the computation of `cache-teacher`, in the second of two passes."""
    examples = encode(read_rows(lume, "retain", "train"), load_tokenizer(work / "model"), "neko", 512)
    batches, tokens = teacher_batches(examples, 8192), sum(map(len, examples))
    torch.cuda.reset_peak_memory_stats(lm.device)
    for _ in range(2):
        start = clock(lm.device)
        for batch in batches:
            top_k_entries(lm, batch, 1, 64, 0.999)
        seconds = clock(lm.device) - start
    peak = torch.cuda.max_memory_allocated(lm.device)
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds, "allocated": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lume", type=Path, help="folder with LUME's public splits")
    parser.add_argument("--work", type=Path, default=Path("/tmp/neko-lean-bench"), help="work folder (3 GB), kept")
    parser.add_argument("--out", type=Path, default=Path("bench-gpu-step.json"))
    options = parser.parse_args()
    device = pick_device()
    if device.type != "cuda":
        raise SystemExit("this benchmark needs a GPU, but torch.cuda.is_available() is False.")
    prepare(options.work, options.lume, device)
    recipe = load_recipe("neko")
    lm = load_model(options.work / "model", torch.bfloat16, device)
    lm.model.eval()
    batches = step_batches(options.work, recipe, device)
    stepper = Stepper(lm, batches, recipe)
    results: dict[str, Any] = {"title": title(device), "rounds": []}
    for _ in range(2):
        for name, where in (("deterministic", device), ("default", torch.device("cpu"))):
            with deterministic(where):
                timings = stepper.timed()
                results["rounds"].append({"kernels": name, **timings, "of 4 repeats differ": stepper.differ()})
    del stepper, batches
    results["teacher"] = teacher_pass(lm, options.work, options.lume)
    results["when"] = time.strftime("%Y-%m-%d")
    print(json.dumps(results, indent=1))
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""One contender of bench/memory.py and bench/step.py; prints one JSON line.

    .venv/bin/python bench/contenders.py lean /tmp/bench-step --passes 2

The folder is what `prepare` wrote: a random model of OLMo-1B-0724's shape, its teacher cache, and the examples of a
few steps. Each contender runs in a separate process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, OlmoConfig, OlmoForCausalLM

from neko_lean.cache import CacheOptions, TeacherCache, cache_teacher
from neko_lean.data.batching import pad
from neko_lean.data.examples import EncodedExample, read_rows
from neko_lean.data.tokenization import encode
from neko_lean.demo.base_model import write_base
from neko_lean.jsonio import write_jsonl
from neko_lean.memory.prediction import predict
from neko_lean.memory.two_models import LEAN_BASELINE, PUBLISHED_BASELINE, TwoModelBaseline, two_model_loss
from neko_lean.models.causal_lm import checkpoint_activations
from neko_lean.models.devices import pick_device
from neko_lean.models.loading import load_model
from neko_lean.models.memory_use import resident_memory
from neko_lean.options import OutputOptions
from neko_lean.recipe import Recipe, load_recipe
from neko_lean.training.batch import Batch, make_batch
from neko_lean.training.determinism import deterministic
from neko_lean.training.layers import decoder_layers
from neko_lean.training.layerwise import LayerPass
from neko_lean.training.losses import batch_losses
from neko_lean.training.optimizer import InBackwardAdam8bit

NAMES = {
    "lean": "neko-lean",
    "lean-offloaded": "neko-lean, --offload-state --offload-activations",
    "two-bf16": LEAN_BASELINE.name,
    "two-fp32": PUBLISHED_BASELINE.name,
}
STEPS = 3  # different sets of examples; each pass takes the next
LIMIT = 0.93  # share of the machine's memory at which a contender on a CPU stops itself


def examples_per_step(device: torch.device) -> int:
    """Examples of each set per step: 32 on a GPU, 4 on a CPU."""
    return 32 if device.type == "cuda" else 4


def names(device: torch.device) -> list[str]:
    """The contenders for a device: offloading to host memory is meaningless on a CPU."""
    return [name for name in NAMES if device.type == "cuda" or name != "lean-offloaded"]


def title(device: torch.device) -> str:
    n = examples_per_step(device)
    return f"One step of 1.28 billion parameters, {n} forget and {n} retain examples of LUME; {device_name(device)}"


# OLMo-1B-0724's shape.
OLMO_1B = {
    "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 16,
}  # fmt: skip


def olmo_config(sizes: dict[str, int]) -> OlmoConfig:
    """The config of an untied OLMo of this shape."""
    return OlmoConfig(**sizes, tie_word_embeddings=False, pad_token_id=1, eos_token_id=0, bos_token_id=None)


def random_olmo_1b() -> OlmoForCausalLM:
    """A model of OLMo-1B-0724's shape with random weights, in bfloat16."""
    return random_olmo(OLMO_1B, torch.bfloat16, torch.device("cpu"))


def random_olmo(sizes: dict[str, int], dtype: torch.dtype, device: torch.device) -> OlmoForCausalLM:
    """A model of this shape with random weights, drawn on `device`."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return OlmoForCausalLM(olmo_config(sizes))
    finally:
        torch.set_default_dtype(default)


def prepare(work: Path, lume: Path, device: torch.device) -> None:
    """Write model/, cache/, forget.jsonl and retain.jsonl, unless they exist already."""
    if (work / "ready").is_file():
        return
    work.mkdir(parents=True, exist_ok=True)
    count = STEPS * examples_per_step(device)
    splits = {name: read_rows(lume, name, "train") for name in ("forget", "retain")}
    # A tokenizer as large as the real one, trained on the examples, so that nothing is downloaded from the hub.
    write_base(work / "model", [*splits["forget"], *splits["retain"]], vocabulary=50280)
    for name, examples in splits.items():
        write_jsonl(work / f"{name}.jsonl", map(asdict, examples[:: len(examples) // count][:count]))
    random_olmo_1b().save_pretrained(work / "model")
    cache_teacher(
        work / "model",
        work / "cache",
        retain=work,
        cache=CacheOptions(max_length=128, format="neko"),
        run=OutputOptions(device=str(device), overwrite=True),
    )
    (work / "ready").touch()


class Resident(threading.Thread):
    """Samples the resident set every 20 ms and records its peak; stops the process before memory runs out."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = self.peak = resident_memory()
        self.limit = int(LIMIT * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, resident_memory())
            if self.peak > self.limit:
                print(json.dumps({"out_of_memory": True, "peak": self.peak - self.start_bytes}), flush=True)
                os._exit(0)
            time.sleep(0.02)


def lean(work: Path, passes: int, device: torch.device, offload: bool) -> dict[str, Any]:
    """neko-lean: a first step with its update, then timed passes of forward + backward."""
    lm = load_model(work / "model", torch.bfloat16, device)
    lm.model.eval()
    recipe = replace(load_recipe("neko"), offload_state=offload, offload_activations=offload)
    batches = step_batches(work, recipe, device)
    optimizer = InBackwardAdam8bit(lm.model.named_parameters(), offload=offload)
    walk = LayerPass(lm, decoder_layers(lm), offload=offload)
    update_seconds = 0.0

    def update(parameter: torch.nn.Parameter) -> None:
        nonlocal update_seconds
        start = clock(device)
        optimizer.update(parameter)
        update_seconds += clock(device) - start

    def forget_gradient(parameter: torch.nn.Parameter) -> None:
        parameter.grad = None

    def one_pass(number: int, complete: Callable[[torch.nn.Parameter], None]) -> float:
        start = clock(device)
        batch = batches[number % STEPS]
        losses = batch_losses(walk.forward(batch.micro), lm, batch, recipe)
        losses["loss"].backward()
        walk.backward(complete)
        return clock(device) - start

    optimizer.begin_step(5e-5)
    first_step = one_pass(0, update)
    seconds = [one_pass(number, forget_gradient) for number in range(passes)]
    predicted = predict(
        lm.model.config,
        recipe,
        [tuple(ids.shape) for ids in batches[0].micro.input_ids],
        [len(i) for i in batches[0].micro.index],
    )
    weights = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    return {
        "update_seconds": update_seconds,
        "first_step_seconds": first_step,
        "seconds": seconds,
        "tokens": [batches[number % STEPS].tokens for number in range(passes)],
        "floor": weights + optimizer.state_bytes(),
        "predicted": predicted.peak_on(device),
    }


def two_models(work: Path, passes: int, device: torch.device, baseline: TwoModelBaseline) -> dict[str, Any]:
    """Two models in memory: a first step with its update, then timed passes of forward + backward."""
    student = load_model(work / "model", baseline.dtype, device).model.train()
    teacher = load_model(work / "model", baseline.dtype, device).model.eval()
    if baseline.checkpointing:
        checkpoint_activations(student)
    examples = step_examples(work, device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-5)

    def one_pass(number: int) -> float:
        start = clock(device)
        batches = [
            padded([example.input_ids for example in split], baseline, device) for split in examples[number % STEPS]
        ]
        two_model_loss(student, teacher, *batches, 0.2).backward()
        return clock(device) - start

    first_pass = one_pass(0)
    start = clock(device)
    optimizer.step()
    update_seconds = clock(device) - start
    optimizer.zero_grad()
    seconds = []
    for number in range(passes):
        seconds.append(one_pass(number))
        optimizer.zero_grad()
    tokens = [sum(map(len, [*forget, *retain])) for forget, retain in examples]
    return {
        "update_seconds": update_seconds,
        "first_step_seconds": first_pass + update_seconds,
        "seconds": seconds,
        "tokens": [tokens[number % STEPS] for number in range(passes)],
    }


def padded(
    rows: list[list[int]], baseline: TwoModelBaseline, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, L] and mask [B, L] of rows, padded as the baseline does."""
    ids, mask = pad(rows, 1, device)
    missing = (baseline.max_length or 0) - ids.shape[1]
    if missing > 0:
        ids, mask = (torch.nn.functional.pad(t, (0, missing), value=v) for t, v in ((ids, 1), (mask, 0)))
    return ids, mask


def step_examples(work: Path, device: torch.device) -> list[tuple[list[EncodedExample], list[EncodedExample]]]:
    """The forget and retain examples of each step."""
    tokenizer, n = AutoTokenizer.from_pretrained(work / "model"), examples_per_step(device)
    forget, retain = (encode(read_rows(work, name), tokenizer, "neko", 128) for name in ("forget", "retain"))
    return [(forget[start : start + n], retain[start : start + n]) for start in range(0, STEPS * n, n)]


def step_batches(work: Path, recipe: Recipe, device: torch.device) -> list[Batch]:
    """The batch of each step, with the teacher's cache."""
    cache = TeacherCache(work / "cache")
    return [make_batch(forget, retain, cache, recipe, 1, device) for forget, retain in step_examples(work, device)]


def clock(device: torch.device) -> float:
    """Seconds, after all work on the GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def run(name: str, work: Path, passes: int, device: torch.device) -> dict[str, Any]:
    """Run one contender in a separate process and read its JSON line."""
    command = [sys.executable, __file__, name, str(work), "--passes", str(passes), "--device", str(device)]
    completed = subprocess.run(command, capture_output=True, text=True)
    lines = completed.stdout.strip().splitlines()
    if not lines:
        raise SystemExit(f"{name} ended with exit code {completed.returncode}:\n{completed.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{models[0].partition(': ')[2]}, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("work", type=Path)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--device")
    options = parser.parse_args()
    device = pick_device(options.device)
    sampler = Resident()  # started after the imports, which do not count
    if device.type == "cpu":
        sampler.start()
    torch.manual_seed(0)
    try:
        if options.name.startswith("lean"):
            with deterministic(device):  # as `unlearn` does
                result = lean(options.work, options.passes, device, options.name == "lean-offloaded")
        else:
            baseline = LEAN_BASELINE if options.name == "two-bf16" else PUBLISHED_BASELINE
            result = two_models(options.work, options.passes, device, baseline)
    except torch.OutOfMemoryError:
        result = {"out_of_memory": True}
    result["peak"] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else sampler.peak
    if device.type == "cpu":
        result["peak"] -= sampler.start_bytes
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

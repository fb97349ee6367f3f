"""Sections of bench/gpu.py without training: the machine, the rows, the tests marked cuda, scoring and caching."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from contenders import clock, device_name
from gpu_setup import Setup, full_step, load_steps, random_lm, write_rows

from neko_lean.cache.planning import teacher_batches
from neko_lean.cache.teacher import top_k_entries
from neko_lean.errors import NekoLeanError
from neko_lean.models import peak_memory, reset_peak_memory
from neko_lean.options import ScoreSettings
from neko_lean.scoring.generation import generate

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "torch", "transformers", "bitsandbytes", "safetensors", "torchao", "triton", "liger-kernel", "cut-cross-entropy",
    "flash-attn", "pytest", "hypothesis",
)  # fmt: skip
NEW_TOKENS = 256  # of each generation, as in `score`
TEACHER_TOKENS = 8192  # positions of a batch of `cache-teacher`


def describe_machine(setup: Setup, lume: str | None) -> dict[str, Any]:
    """Card, driver and versions; writes the rows that the other sections read."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        versions[package] = None
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "device": device_name(setup.device),
        "memory": torch.cuda.get_device_properties(setup.device).total_memory if setup.device.type == "cuda" else None,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": versions,
        "rows": write_rows(setup, Path(lume) if lume else None),
    }


def driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    return None


def run_cuda_tests(setup: Setup) -> dict[str, Any]:
    """Run the tests marked cuda until the time limit, those that compile last. Returns the outcome of each test."""
    deadline = time.monotonic() + setup.seconds - 5
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in path.read_text()]
    log, finished = setup.folder / "tests.log", True
    with log.open("w") as output:
        for chosen in ("",) if setup.toy else ("not compiled and not flex", "compiled or flex"):
            command = [sys.executable, "-m", "pytest", "-m", "cuda", "-k", chosen, "-vv", "--tb=line", *files]
            with suppress(subprocess.TimeoutExpired):
                left = max(1, deadline - time.monotonic())
                subprocess.run(
                    command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=left
                )
                continue
            finished = False

    text = log.read_text(errors="replace")
    outcomes = dict(re.findall(r"^(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR)\b", text, re.M))
    if not outcomes:
        raise NekoLeanError(f"pytest ran no test: {' / '.join(text.strip().splitlines()[-2:])}")
    return {"finished": finished, "outcomes": outcomes}


def score_speed(setup: Setup) -> dict[str, Any]:
    """Tokens per second of `score`'s greedy decoding, and of the computation of `cache-teacher`.

    Generations run to their limit: the answers of random weights would otherwise end after their windows.
    """
    lm, tokenizer = random_lm(setup), word_tokenizer(setup.sizes["vocab_size"])
    encoded = [example for step in load_steps(setup) for part in step for example in part][: 8 if setup.toy else 64]
    examples, prompts = [e.example for e in encoded], [e.input_ids[: e.prompt_length] for e in encoded]
    batch_size, limit = ScoreSettings().batch_size, 8 if setup.toy else NEW_TOKENS

    def run(count: int, new_tokens: int) -> int:
        batches = generate(
            lm, tokenizer, examples[:count], batch_size=batch_size, max_new_tokens=new_tokens, prompts=prompts[:count],
            stop_early=False,
        )  # fmt: skip
        generations = [generation for batch in batches for _, generation in batch]
        return sum(new_tokens if g.ended == "limit" else len(g.text.split()) for g in generations)

    run(4, 4)
    reset_peak_memory(setup.device)
    start = clock(setup.device)
    tokens = run(len(examples), limit)
    generation = speed(setup, tokens, clock(setup.device) - start)
    return {"generation": {**generation, "batch_size": batch_size}, "teacher": teacher_speed(setup, lm)}


def teacher_speed(setup: Setup, lm: Any) -> dict[str, float]:
    """Tokens per second and peak of the computation of `cache-teacher`, in the second of two passes."""
    examples = [example for part in full_step(setup) for example in part] * (1 if setup.toy else 8)
    reset_peak_memory(setup.device)
    for _ in range(2):
        start = clock(setup.device)
        for batch in teacher_batches(examples, TEACHER_TOKENS):
            top_k_entries(lm, batch, 1, 64, 0.999)
        seconds = clock(setup.device) - start
    return speed(setup, sum(map(len, examples)), seconds)


def speed(setup: Setup, tokens: int, seconds: float) -> dict[str, float]:
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak": peak_memory(setup.device),
    }


def word_tokenizer(vocab_size: int) -> Any:
    """A tokenizer with the words w0, w1, ... as tokens; made here, because nothing can be downloaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(vocab_size)}, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0", pad_token="w1", unk_token="w2")

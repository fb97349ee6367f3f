"""What a cache costs and how accurate it is: bytes per token against the error of the KL and of its gradient.

    neko-lean demo --data LUME --split validation --out lume-run     # makes the model that knows its examples by heart
    .venv/bin/python bench/cache.py lume-run --out bench-cache/

Three teachers on the run's retain set: the memorised model; the same model with the `neko` template, which it never
saw; and the model before memorising (random weights: a flat teacher, the hard case). For each, there is a student that
changed a little and one that changed a lot: the teacher's weights plus Gaussian noise. The reference is the dense KL
in float64 and its gradient with respect to the student's last hidden states. Prints a table per teacher and writes
cache.json and cache.png. Needs `pip install -e '.[bench]'`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cache_plot import CHANGES, plot, table
from contenders import random_olmo_1b
from rich.console import Console
from torch import Tensor

from neko_lean.cache import CacheOptions, TeacherCache, cache_teacher
from neko_lean.cache.planning import teacher_batches
from neko_lean.cache.teacher import hidden_states, top_k_entries
from neko_lean.data.batching import pad
from neko_lean.data.examples import EncodedExample, read_rows
from neko_lean.data.tokenization import encode
from neko_lean.jsonio import write_jsonl
from neko_lean.memory.live_tensors import LiveTensors
from neko_lean.models.causal_lm import CausalLM, as_causal_lm
from neko_lean.models.chunked_head import token_stats
from neko_lean.models.lm_head import CHUNK_ELEMENTS
from neko_lean.models.loading import load_model, load_tokenizer, new_model
from neko_lean.models.memory_use import peak_memory
from neko_lean.options import OutputOptions

CPU = torch.device("cpu")
# (top-k, mass): top-k only, then the default top-k with several masses, then mass only. 0 is the whole vocabulary.
SETTINGS = [(1, 1.0), (4, 1.0), (16, 1.0), (64, 1.0), (256, 1.0), (1024, 1.0), (0, 1.0)]
SETTINGS += [(64, 0.99), (64, 0.999), (64, 0.9999), (0, 0.99), (0, 0.999), (0, 0.9999)]
# (top-k, number of tail tokens sampled with importance weights)
SAMPLES = [(64, 32), (64, 128), (256, 128), (256, 512)]
ENTRY, POSITION = 4, 12  # bytes of an entry, and of a position's offset and tail


@dataclass
class Student:
    """A student's hidden states on all examples and the dense reference."""

    hidden: list[Tensor]  # [n, d] per example, float64
    head: Tensor  # [V, d] float64
    kl: Tensor  # [N] dense KL
    grad: Tensor  # [N, d] gradient of the mean dense KL with respect to the hidden states


@torch.no_grad()
def student(folder: Path, examples: list[EncodedExample], teacher_logp: list[Tensor], noise: float) -> Student:
    """The teacher plus noise, and its dense KL and gradient."""
    changed = load_model(folder, torch.float32, CPU)
    generator = torch.Generator().manual_seed(1)
    for weight in changed.model.parameters():
        weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
    hidden = [hidden_states(changed, [example], 0).double() for example in examples]
    head = changed.head.double()
    kls, grads, total = [], [], sum(map(len, examples))
    for states, logp in zip(hidden, teacher_logp, strict=True):
        logq = (states @ head.T).log_softmax(1)
        kls.append((logp.exp() * (logp - logq)).sum(1))
        grads.append((logq.exp() - logp.exp()) @ head / total)
    return Student(hidden, head, torch.cat(kls), torch.cat(grads))


def variant(name: str, logp: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """Three ways to treat the tail: keep it as a bucket, renormalise the entries to include it, or drop it."""
    if name == "bucket":
        return logp, tail
    empty = torch.full_like(tail, -torch.inf)
    return (logp - logp.logsumexp(1, keepdim=True) if name == "renormalised" else logp), empty


def sampled(logp: Tensor, k: int, draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The top-k entries, and `draws` tail tokens sampled by probability with a weight of t / draws each, where t is the
    probability of the tail. This is unbiased (arXiv 2503.16870)."""
    values, ids = logp.topk(k, dim=1)
    rest = logp.exp().scatter(1, ids, 0.0)  # [n, V]
    t = rest.sum(1, keepdim=True)
    drawn = torch.multinomial(rest.clamp(min=1e-300), draws, replacement=True, generator=generator)
    weight = torch.zeros_like(rest).scatter_add_(1, drawn, (t / draws).expand_as(drawn).contiguous())
    # A token that was sampled twice is one entry with twice the weight.
    tail_weight, tail_ids = weight.topk(min(draws, weight.shape[1]), dim=1)
    both = torch.cat([values, tail_weight.log()], dim=1)
    return torch.cat([ids, tail_ids], dim=1), both, torch.full((len(logp),), -torch.inf, dtype=both.dtype)


def compare(student: Student, stored: Iterator[tuple[Tensor, Tensor, Tensor]]) -> dict[str, float]:
    """Compare the KL and gradient computed from the stored entries of each example with the dense ones."""
    kls, grads, total = [], [], len(student.kl)
    for states, (ids, logp, tail) in zip(student.hidden, stored, strict=True):
        leaf = states.clone().requires_grad_()
        no_target = torch.full((len(states),), -1)
        _, kl = token_stats(leaf, student.head, no_target, ids, logp.double(), tail.double())
        grads.append(torch.autograd.grad(kl.sum() / total, leaf)[0])
        kls.append(kl.detach())
    kl, grad = torch.cat(kls), torch.cat(grads)
    return {
        "dense_kl": student.kl.mean().item(),
        "kl_error": (kl.mean() - student.kl.mean()).item() / max(1e-12, student.kl.mean().item()),
        "cosine": torch.cosine_similarity(grad.flatten(), student.grad.flatten(), dim=0).item(),
        "gradient_error": ((grad - student.grad).norm() / student.grad.norm()).item(),
    }


def measure(folder: Path, retain: Path, style: str) -> list[dict[str, Any]]:
    """Measure all settings for one teacher; returns a table row for each."""
    examples = encode(read_rows(retain), load_tokenizer(folder), style, 512)
    teacher = load_model(folder, torch.float32, CPU)
    with torch.no_grad():
        head = teacher.head.double().T
        teacher_logp = [(hidden_states(teacher, [example], 0).double() @ head).log_softmax(1) for example in examples]
    students = {name: student(folder, examples, teacher_logp, noise) for name, noise in CHANGES.items()}

    lines = []
    for top_k, mass in SETTINGS:
        lines += measure_setting(folder, retain, style, examples, students, top_k, mass)
    for top_k, draws in SAMPLES:
        lines.append(measure_sampling(teacher_logp, students, top_k, draws))
    return lines


def measure_setting(
    folder: Path,
    retain: Path,
    style: str,
    examples: list[EncodedExample],
    students: dict[str, Student],
    top_k: int,
    mass: float,
) -> list[dict[str, Any]]:
    """Make a real cache with this top-k and mass, and compare the three treatments of its tail."""
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        manifest = cache_teacher(
            folder,
            Path(scratch) / "c",
            retain=retain,
            cache=CacheOptions(top_k=top_k or 10**6, mass=mass, format=style, dtype="float32"),
            run=OutputOptions(quiet=True),
        )
        cache = TeacherCache(Path(scratch) / "c")
        size = sum(shard.bytes for shard in manifest.shards) / manifest.positions
        for tail_name in ("bucket", "renormalised", "dropped"):
            line: dict[str, Any] = {"top_k": top_k or "V", "mass": mass, "tail": tail_name, "bytes": size}
            line["captured"] = manifest.mean_mass
            for name, changed in students.items():
                entries = (cache.read([example]) for example in examples)
                stored = ((ids, *variant(tail_name, logp, tail)) for ids, logp, tail in entries)
                line[name] = compare(changed, stored)
            lines.append(line)
    return lines


def measure_sampling(
    teacher_logp: list[Tensor], students: dict[str, Student], top_k: int, draws: int
) -> dict[str, Any]:
    """Compare top-k entries plus sampled tail tokens, which no cache stores, with the dense reference."""
    line: dict[str, Any] = {"top_k": top_k, "mass": 1.0, "tail": f"{draws} sampled"}
    generator = torch.Generator().manual_seed(2)
    parts = [sampled(logp, top_k, draws, generator) for logp in teacher_logp]
    counts = np.concatenate([(logp > -torch.inf).sum(1) for _, logp, _ in parts])
    line["bytes"] = POSITION + ENTRY * float(np.mean(counts))
    line["captured"] = float(torch.cat([logp.topk(top_k, dim=1)[0].exp().sum(1) for logp in teacher_logp]).mean())
    for name, changed in students.items():
        line[name] = compare(changed, iter(parts))
    return line


def speed(teacher: CausalLM, examples: list[EncodedExample], rounds: int = 5) -> dict[str, float]:
    """Time and memory of the caching pass.

    Time is compared with the teacher's plain forward pass (transformers' own, with logits) over the same batches, batch
    by batch in turn; the result is the median ratio. Memory is that of the caching pass over the largest batch, above
    the loaded teacher: the resident set, and live tensors, compared with those of the backbone alone.
    """
    batches = teacher_batches(examples, 8192)
    before = peak_memory(CPU)
    top_k_entries(teacher, batches[-1], 0, 64, 0.999)
    grown = peak_memory(CPU) - before
    with LiveTensors() as backbone:
        hidden_states(teacher, batches[-1], 0)
    with LiveTensors() as live:
        top_k_entries(teacher, batches[-1], 0, 64, 0.999)
    ratios, bare_total, cached_total = [], 0.0, 0.0
    for _ in range(rounds):
        bare = cached = 0.0
        for batch in batches:
            start = time.perf_counter()
            bare_forward(teacher, batch)
            middle = time.perf_counter()
            top_k_entries(teacher, batch, 0, 64, 0.999)
            cached += time.perf_counter() - middle
            bare += middle - start
        ratios.append(bare / cached)
        bare_total, cached_total = bare_total + bare, cached_total + cached
    return {
        "speed_of_caching_over_bare_forward": float(np.median(ratios)),
        "bare_seconds": bare_total / rounds,
        "caching_seconds": cached_total / rounds,
        "resident_above_teacher_bytes": grown,
        "live_tensors_bytes": live.peak,
        "live_tensors_of_the_backbone_bytes": backbone.peak,
        "chunk_of_logits_bytes": 4 * CHUNK_ELEMENTS,
    }


@torch.no_grad()
def bare_forward(teacher: CausalLM, batch: list[EncodedExample]) -> None:
    """transformers' own forward pass, with logits and an attention mask."""
    input_ids, mask = pad([one.input_ids for one in batch], 0, CPU)
    teacher.model(input_ids=input_ids, attention_mask=mask, use_cache=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of `neko-lean demo`")
    parser.add_argument("--out", type=Path, default=Path("bench-cache"))
    parser.add_argument("--every", type=int, default=1, help="measure accuracy on every Nth example only")
    parser.add_argument(
        "--large", action="store_true", help="also time caching at OLMo-1B geometry (3 GiB, one minute)"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    retain = options.run / "data" / "retain.jsonl"
    examples = encode(read_rows(retain), load_tokenizer(options.run / "target"), "plain", 512)
    teacher = load_model(options.run / "target", torch.bfloat16, CPU)
    teacher.model.eval()
    speeds = {"target": speed(teacher, examples)}
    if options.large:
        large = as_causal_lm(random_olmo_1b().eval())
        speeds["OLMo-1B-0724 geometry"] = speed(large, examples[:: len(examples) // 8], rounds=3)
    print(json.dumps({"device": "CPU", "threads": torch.get_num_threads(), "speed": speeds}))

    torch.set_num_threads(1)  # one example at a time leaves little work for more threads
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        flat = Path(scratch) / "flat"
        new_model(options.run / "base", torch.float32, CPU, 0).model.save_pretrained(flat)
        load_tokenizer(options.run / "base").save_pretrained(flat)
        target = options.run / "target"
        few = Path(scratch) / "retain.jsonl"
        write_jsonl(few, map(asdict, read_rows(retain)[:: options.every]))
        for name, folder, style in (
            ("memorised", target, "plain"),
            ("templated", target, "neko"),
            ("flat", flat, "plain"),
        ):
            results[name] = measure(folder, few, style)
            dense = {change: f"{results[name][0][change]['dense_kl']:.3g}" for change in CHANGES}
            Console(width=170).print(table(f"{name} teacher, CPU; dense KL {dense}", results[name]))
    (options.out / "cache.json").write_text(json.dumps({"speed": speeds, **results}, indent=1) + "\n")
    plot(results, options.out / "cache.png")
    print(options.out / "cache.png")


if __name__ == "__main__":
    main()

"""What a cache costs and what it is worth: bytes a token against the error of the KL and of its gradient.

    neko-lean demo --data lume/ --split validation --out lume-run     (makes the model that knows its rows by heart)
    .venv/bin/python bench/cache.py lume-run --out bench-cache/

Three teachers over the run's retain rows: the memorised model; the same asked in the `neko` template, which it never
saw; and the same before memorising (random weights: a flat teacher, the hard case). For each, a student that moved a
little and one that moved a lot: the teacher's weights plus Gaussian noise. The reference is the dense KL in float64
and its gradient on the student's last hidden states.
Prints a table a teacher, writes cache.json and cache.png. Needs `pip install -e '.[bench]'`.
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
from contenders import random_olmo_1b
from rich.console import Console
from rich.table import Table
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
from neko_lean.models.chunked_head import CHUNK_ELEMENTS, token_stats
from neko_lean.models.devices import peak_memory
from neko_lean.models.loading import load_model, load_tokenizer, new_model
from neko_lean.options import OutputOptions

CPU = torch.device("cpu")
MOVES = {"little": 0.03, "lot": 0.3}  # standard deviation of the noise over that of each weight tensor
# (top-k, mass): k alone, then the default k with masses, then masses alone. 0 stands for the whole vocabulary.
SETTINGS = [(1, 1.0), (4, 1.0), (16, 1.0), (64, 1.0), (256, 1.0), (1024, 1.0), (0, 1.0)]
SETTINGS += [(64, 0.99), (64, 0.999), (64, 0.9999), (0, 0.99), (0, 0.999), (0, 0.9999)]
SAMPLES = [(64, 32), (64, 128), (256, 128), (256, 512)]  # top-k beside tail tokens drawn with importance weights
ENTRY, POSITION = 4, 12  # bytes of an entry, and of a position's offset and tail


@dataclass
class Student:
    """A student's hidden states over all rows and the dense reference."""

    hidden: list[Tensor]  # [n, d] a row, float64
    head: Tensor  # [V, d] float64
    kl: Tensor  # [N] dense KL
    grad: Tensor  # [N, d] gradient of the mean dense KL on the hidden states


@torch.no_grad()
def student(folder: Path, rows: list[EncodedExample], teacher_logp: list[Tensor], noise: float) -> Student:
    moved = load_model(folder, torch.float32, CPU)
    generator = torch.Generator().manual_seed(1)
    for weight in moved.model.parameters():
        weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
    hidden = [hidden_states(moved, [one], 0).double() for one in rows]
    head = moved.head.double()
    kls, grads, total = [], [], sum(map(len, rows))
    for states, logp in zip(hidden, teacher_logp, strict=True):
        logq = (states @ head.T).log_softmax(1)
        kls.append((logp.exp() * (logp - logq)).sum(1))
        grads.append((logq.exp() - logp.exp()) @ head / total)
    return Student(hidden, head, torch.cat(kls), torch.cat(grads))


def variant(name: str, logp: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """The three things that can be done with the tail: keep it as a bucket, spread it over the entries, drop it."""
    if name == "bucket":
        return logp, tail
    nothing = torch.full_like(tail, -torch.inf)
    return (logp - logp.logsumexp(1, keepdim=True) if name == "renormalised" else logp), nothing


def sampled(logp: Tensor, k: int, draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k as it is, and `draws` tail tokens drawn by probability, t / draws each: unbiased (arXiv 2503.16870)."""
    values, ids = logp.topk(k, dim=1)
    rest = logp.exp().scatter(1, ids, 0.0)  # [n, V]
    t = rest.sum(1, keepdim=True)
    drawn = torch.multinomial(rest.clamp(min=1e-300), draws, replacement=True, generator=generator)
    weight = torch.zeros_like(rest).scatter_add_(1, drawn, (t / draws).expand_as(drawn).contiguous())
    # A token that was drawn twice is one entry of twice the weight.
    tail_weight, tail_ids = weight.topk(min(draws, weight.shape[1]), dim=1)
    both = torch.cat([values, tail_weight.log()], dim=1)
    return torch.cat([ids, tail_ids], dim=1), both, torch.full((len(logp),), -torch.inf, dtype=both.dtype)


def compare(one: Student, stored: Iterator[tuple[Tensor, Tensor, Tensor]]) -> dict[str, float]:
    """KL and gradient from what is stored of each row against the dense ones."""
    kls, grads, total = [], [], len(one.kl)
    for states, (ids, logp, tail) in zip(one.hidden, stored, strict=True):
        leaf = states.clone().requires_grad_()
        nothing = torch.full((len(states),), -1)
        _, kl = token_stats(leaf, one.head, nothing, ids, logp.double(), tail.double())
        grads.append(torch.autograd.grad(kl.sum() / total, leaf)[0])
        kls.append(kl.detach())
    kl, grad = torch.cat(kls), torch.cat(grads)
    return {
        "dense_kl": one.kl.mean().item(),
        "kl_error": (kl.mean() - one.kl.mean()).item() / max(1e-12, one.kl.mean().item()),
        "cosine": torch.cosine_similarity(grad.flatten(), one.grad.flatten(), dim=0).item(),
        "gradient_error": ((grad - one.grad).norm() / one.grad.norm()).item(),
    }


def measure(folder: Path, retain: Path, style: str) -> list[dict[str, Any]]:
    """All settings for one teacher."""
    tokenizer = load_tokenizer(folder)
    rows = encode(read_rows(retain), tokenizer, style, 512)
    teacher = load_model(folder, torch.float32, CPU)
    with torch.no_grad():
        live = [(hidden_states(teacher, [one], 0).double() @ teacher.head.double().T).log_softmax(1) for one in rows]
    students = {name: student(folder, rows, live, noise) for name, noise in MOVES.items()}
    found = []
    for top_k, mass in SETTINGS:
        with tempfile.TemporaryDirectory() as scratch:
            made = cache_teacher(
                folder,
                retain,
                Path(scratch) / "c",
                cache=CacheOptions(top_k=top_k or 10**6, mass=mass, format=style, dtype="float32"),
                run=OutputOptions(quiet=True),
            )
            cache = TeacherCache(Path(scratch) / "c")
            size = sum(shard.bytes for shard in made.shards) / made.positions
            for tail_name in ("bucket", "renormalised", "dropped"):
                line: dict[str, Any] = {"top_k": top_k or "V", "mass": mass, "tail": tail_name, "bytes": size}
                line["captured"] = made.mean_mass
                for name, one in students.items():
                    stored = (
                        (ids, *variant(tail_name, logp, tail))
                        for ids, logp, tail in (cache.read([row]) for row in rows)
                    )
                    line[name] = compare(one, stored)
                found.append(line)
    for top_k, draws in SAMPLES:
        line = {"top_k": top_k, "mass": 1.0, "tail": f"{draws} sampled"}
        generator = torch.Generator().manual_seed(2)
        parts = [sampled(logp, top_k, draws, generator) for logp in live]
        line["bytes"] = POSITION + ENTRY * float(
            np.mean(np.concatenate([(p > -torch.inf).sum(1) for _, p, _ in parts]))
        )
        line["captured"] = float(torch.cat([p.topk(top_k, dim=1)[0].exp().sum(1) for p in live]).mean())
        for name, one in students.items():
            line[name] = compare(one, iter(parts))
        found.append(line)
    return found


def speed(teacher: CausalLM, rows: list[EncodedExample], rounds: int = 5) -> dict[str, float]:
    """Seconds of the teacher's bare forward pass (transformers' own, with logits) and of the caching pass over the same
    batches, batch by batch in turn: the median ratio. Memory of the caching pass over the largest batch, above the
    loaded teacher: by resident set, and by live tensors beside those of the backbone alone (one layer at a time)."""
    batches = teacher_batches(rows, 8192)
    before = peak_memory(CPU)["process"]
    top_k_entries(teacher, batches[-1], 0, 64, 0.999)
    grown = peak_memory(CPU)["process"] - before
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
    input_ids, mask = pad([one.input_ids for one in batch], 0, CPU)
    teacher.model(input_ids=input_ids, attention_mask=mask, use_cache=False)


def table(title: str, lines: list[dict[str, Any]]) -> Table:
    heads = ("top-k", "mass", "tail", "bytes/token", "captured")
    each = ("KL error", "grad cosine", "grad error")
    found = Table(title=title, title_justify="left")
    for head in (*heads, *(f"{e}, {name}" for name in MOVES for e in each)):
        found.add_column(head, justify="right")
    for line in lines:
        cells = [
            str(line["top_k"]),
            f"{line['mass']:g}",
            line["tail"],
            f"{line['bytes']:.1f}",
            f"{line['captured']:.4f}",
        ]
        for name in MOVES:
            one = line[name]
            cells += [f"{one['kl_error']:+.1%}", f"{one['cosine']:.5f}", f"{one['gradient_error']:.4f}"]
        found.add_row(*cells)
    return found


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.2), sharey=True)
    styles = {"bucket": "o", "renormalised": "s", "dropped": "x", "sampled": "^"}
    for axis, (teacher, lines) in zip(axes, results.items(), strict=True):
        for style, marker in styles.items():
            for name, colour in (("little", "tab:blue"), ("lot", "tab:orange")):
                some = sorted((li["bytes"], 1 - li[name]["cosine"]) for li in lines if li["tail"].endswith(style))
                if some:
                    x, y = zip(*some, strict=True)
                    label = f"{style}, moved a {name}"
                    axis.plot(x, np.maximum(y, 1e-9), marker, color=colour, markersize=5, label=label, alpha=0.75)
        axis.axhline(1e-3, color="grey", linewidth=0.8, linestyle="--")
        axis.set(xscale="log", yscale="log", xlabel="bytes a token", title=f"{teacher} teacher")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("1 - cosine to the dense gradient")
    axes[2].legend(fontsize=7, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder that `neko-lean demo` wrote")
    parser.add_argument("--out", type=Path, default=Path("bench-cache"))
    parser.add_argument("--every", type=int, default=1, help="measure fidelity on every Nth row")
    parser.add_argument("--large", action="store_true", help="time caching at OLMo-1B geometry too (3 GiB, a minute)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    retain = options.run / "data" / "retain.jsonl"
    rows = encode(read_rows(retain), load_tokenizer(options.run / "target"), "plain", 512)
    teacher = load_model(options.run / "target", torch.bfloat16, CPU)
    teacher.model.eval()
    quick = {"target": speed(teacher, rows)}
    if options.large:
        quick["OLMo-1B-0724 geometry"] = speed(as_causal_lm(random_olmo_1b().eval()), rows[:: len(rows) // 8], rounds=3)
    print(json.dumps({"device": "CPU", "threads": torch.get_num_threads(), "speed": quick}))
    torch.set_num_threads(1)  # row by row there is little to share
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
            dense = {move: f"{results[name][0][move]['dense_kl']:.3g}" for move in MOVES}
            Console(width=170).print(table(f"{name} teacher, CPU; dense KL {dense}", results[name]))
    (options.out / "cache.json").write_text(json.dumps({"speed": quick, **results}, indent=1) + "\n")
    plot(results, options.out / "cache.png")
    print(options.out / "cache.png")


if __name__ == "__main__":
    main()

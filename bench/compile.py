"""Decoder layers with and without torch.compile: time and results of a step without its update.

    .venv/bin/python bench/compile.py --out bench-compile.json

A random OLMo of moderate size, 6 micro-batches of different shapes per step. Both variants run every step in one
process, in alternating order, and the ratio is that of neighbouring steps. Losses and gradients are compared in
float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from contenders import clock, device_name
from transformers import OlmoConfig, OlmoForCausalLM

from neko_lean.models.causal_lm import CausalLM, as_causal_lm
from neko_lean.models.chunked_head import token_stats
from neko_lean.models.devices import pick_device, pick_dtype
from neko_lean.training.layers import compile_layers, decoder_layers
from neko_lean.training.layerwise import LayerPass
from neko_lean.training.micro_batches import MicroBatches

VOCABULARY = 4096


def model(width: int, layers: int, dtype: torch.dtype, device: torch.device) -> CausalLM:
    """A random OLMo with the same weights at each call."""
    config = OlmoConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, pad_token_id=1, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return as_causal_lm(OlmoForCausalLM(config).to(device=device, dtype=dtype).eval())


def micro_batches(number: int, device: torch.device) -> list[torch.Tensor]:
    """Micro-batches [b, l] of up to 256 positions, with different shapes in each step."""
    generator = torch.Generator().manual_seed(number)
    lengths = [int(torch.randint(24, 257, (), generator=generator)) for _ in range(6)]
    return [torch.randint(0, VOCABULARY, (max(1, 256 // n), n), generator=generator).to(device) for n in lengths]


def step(walk: LayerPass, micro: list[torch.Tensor]) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Seconds, loss and gradients of one step; each gradient is taken when it is complete."""
    names = {id(p): name for name, p in walk.lm.model.named_parameters()}
    gradients = {}

    def complete(parameter: torch.nn.Parameter) -> None:
        if parameter.grad is not None:
            gradients[names[id(parameter)]] = parameter.grad
            parameter.grad = None

    start = clock(walk.lm.device)
    index = [torch.arange(0, ids.numel(), 8, device=ids.device) for ids in micro]
    hidden = walk.forward(MicroBatches(micro, [None] * len(micro), index))
    target = torch.cat([ids.flatten()[::8] for ids in micro])
    loss = -token_stats(hidden, walk.lm.head, target)[0].mean()
    loss.backward()
    walk.backward(complete)
    return clock(walk.lm.device) - start, loss.item(), gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("bench-compile.json"))
    options = parser.parse_args()
    device = pick_device()
    results = {}
    for name in ("float32", "bfloat16"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        plain, compiled = (model(options.width, options.layers, pick_dtype(name), device) for _ in range(2))
        walks = [LayerPass(lm, decoder_layers(lm)) for lm in (plain, compiled)]
        compile_layers(walks[1].layers)
        first = [step(walk, micro_batches(0, device))[0] for walk in walks]
        seconds: tuple[list[float], list[float]] = ([], [])
        largest = 0.0
        for number in range(1, options.rounds + 1):
            micro = micro_batches(number, device)
            pair = {variant: step(walks[variant], micro) for variant in ((0, 1) if number % 2 else (1, 0))}
            for variant in (0, 1):
                seconds[variant].append(pair[variant][0])
            differences = [
                (pair[1][2][key] - gradient).norm() / gradient.norm() for key, gradient in pair[0][2].items()
            ]
            largest = max(largest, abs(pair[1][1] / pair[0][1] - 1), *(value.item() for value in differences))
        ratios = [after / before for before, after in zip(*seconds, strict=True)]
        results[name] = {
            "plain": statistics.median(seconds[0]),
            "compiled": statistics.median(seconds[1]),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "first_step_extra_seconds": first[1] - first[0],
            "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
            "largest_relative_difference": largest,
        }
        result = results[name]
        print(
            f"{name}: plain {result['plain']:.2f} s, compiled {result['compiled']:.2f} s, "
            f"ratio {result['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f}); first step "
            f"{result['first_step_extra_seconds']:.0f} s longer, {result['graphs']} graphs; losses and gradients "
            f"differ by at most {largest:.1e}"
        )
    title = f"OLMo of width {options.width}, {options.layers} layers; {device_name(device)}"
    options.out.write_text(json.dumps({"title": title, **results}, indent=1) + "\n")
    print(title)


if __name__ == "__main__":
    main()

"""How much faster `score` generates than one example at a time, with the same outputs and the same numbers.

    .venv/bin/python bench/score.py LUME MODEL [--parts 4] [--batch-size 64] [--out score.json]

LUME is the folder with the dataset's public splits, MODEL a checkpoint folder. All validation examples are generated
with three methods, part by part and in turn: one at a time with transformers' generate and its key-value cache; in
batches; and in batches that stop a generation once its numbers cannot change any more, which is what `score` does. In
float32 the first two must agree exactly, and all three in every score and window.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from neko_lean.data.examples import Example, read_rows
from neko_lean.data.tokenization import encode_text
from neko_lean.models.causal_lm import CausalLM
from neko_lean.models.loading import load_model, load_tokenizer
from neko_lean.scoring.generation import WINDOW, Generation, generate, to_generation
from neko_lean.scoring.task import example_score

SINGLE, BATCHES, EARLY = "one example at a time", "batches", "batches, stopping early"
Numbered = list[tuple[int, Generation]]  # generations with the number of their example


@torch.no_grad()
def one_at_a_time(lm: CausalLM, tokenizer: Any, examples: Sequence[Example], max_new_tokens: int) -> Iterator[Numbered]:
    """Generate with transformers' `generate`, one example at a time."""
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
    )
    lm.model.eval()
    lm.model.generation_config = config
    for number, example in enumerate(examples):
        ids = torch.tensor([encode_text(tokenizer, example.input)])
        window = max(WINDOW, 2 * len(encode_text(tokenizer, " " + example.output)))
        new = lm.model.generate(ids, attention_mask=torch.ones_like(ids))[0, ids.shape[1] :].tolist()
        yield [(number, to_generation(tokenizer, new, window, ""))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lume", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    examples = [row for split in ("forget", "retain") for row in read_rows(options.lume, split, "validation")]
    lm = load_model(options.model, torch.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(options.model)
    settings = {"batch_size": options.batch_size, "max_new_tokens": options.max_new_tokens}
    methods: dict[str, Callable[[Sequence[Example]], Iterator[Numbered]]] = {
        SINGLE: lambda part: one_at_a_time(lm, tokenizer, part, options.max_new_tokens),
        BATCHES: lambda part: generate(lm, tokenizer, part, **settings, stop_early=False),
        EARLY: lambda part: generate(lm, tokenizer, part, **settings),
    }
    generations: dict[str, Numbered] = {method: [] for method in methods}
    seconds = dict.fromkeys(methods, 0.0)
    for part in range(options.parts):
        numbers = list(range(part, len(examples), options.parts))
        for method, run in methods.items():
            start = time.perf_counter()
            for batch in run([examples[i] for i in numbers]):
                generations[method] += [(numbers[i], generation) for i, generation in batch]
            seconds[method] += time.perf_counter() - start
        print(f"part {part + 1} of {options.parts}: {seconds}", flush=True)
    single, batched, early = (
        [generation for _, generation in sorted(numbered, key=lambda pair: pair[0])]
        for numbered in generations.values()
    )
    scores = [
        [example_score(example, generation.text) for example, generation in zip(examples, method, strict=True)]
        for method in (single, batched, early)
    ]
    result = {
        "rows": len(examples),
        "seconds": seconds,
        "ratio": {method: seconds[SINGLE] / value for method, value in seconds.items()},
        "texts that differ": sum(a.text != b.text for a, b in zip(single, batched, strict=True)),
        "windows that differ": sum(a.window != b.window for a, b in zip(single, early, strict=True)),
        "scores that differ": sum(len({*three}) > 1 for three in zip(*scores, strict=True)),
        "stopped early": sum(generation.ended == "settled" for generation in early),
    }
    print("| method | seconds | speed-up |\n|---|--:|--:|")
    for method, value in seconds.items():
        print(f"| {method} | {value:.1f} | {result['ratio'][method]:.2f} |")
    print(json.dumps(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

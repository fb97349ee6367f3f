"""How much faster scoring is than one row at a time, with the same outputs and the same numbers.

    .venv/bin/python bench/score.py LUME MODEL [--parts 4] [--batch-size 64] [--out score.json]

LUME is the folder with the dataset's public splits, MODEL a checkpoint folder. All validation rows are generated in
three ways, part by part and in turn: one row at a time by transformers' generate with its key-value cache, in batches,
and in batches that stop a row once its numbers can change no more, which is what `score` does. In float32 the first two
must agree to the letter, and all three in every row's score and window.
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
from neko_lean.scoring.generation import WINDOW, Generation, generate, spoken
from neko_lean.scoring.task import row_score

ALONE, BATCHES, EARLY = "one row at a time", "batches", "batches, stopping early"
Said = list[tuple[int, Generation]]


@torch.no_grad()
def alone(lm: CausalLM, tokenizer: Any, rows: Sequence[Example], max_new_tokens: int) -> Iterator[Said]:
    """transformers' generate, a row at a time."""
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
    )
    lm.model.eval()
    lm.model.generation_config = config
    for number, row in enumerate(rows):
        ids = torch.tensor([encode_text(tokenizer, row.input)])
        window = max(WINDOW, 2 * len(encode_text(tokenizer, " " + row.output)))
        new = lm.model.generate(ids, attention_mask=torch.ones_like(ids))[0, ids.shape[1] :].tolist()
        yield [(number, spoken(tokenizer, new, window, ""))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lume", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()

    rows = [row for split in ("forget", "retain") for row in read_rows(chosen.lume, split, "validation")]
    lm = load_model(chosen.model, torch.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(chosen.model)
    settings = {"batch_size": chosen.batch_size, "max_new_tokens": chosen.max_new_tokens}
    ways: dict[str, Callable[[Sequence[Example]], Iterator[Said]]] = {
        ALONE: lambda some: alone(lm, tokenizer, some, chosen.max_new_tokens),
        BATCHES: lambda some: generate(lm, tokenizer, some, **settings, stop_early=False),
        EARLY: lambda some: generate(lm, tokenizer, some, **settings),
    }
    said: dict[str, Said] = {way: [] for way in ways}
    seconds = dict.fromkeys(ways, 0.0)
    for part in range(chosen.parts):
        some = list(range(part, len(rows), chosen.parts))
        for way, answer in ways.items():
            start = time.perf_counter()
            for batch in answer([rows[i] for i in some]):
                said[way] += [(some[i], one) for i, one in batch]
            seconds[way] += time.perf_counter() - start
        print(f"part {part + 1} of {chosen.parts}: {seconds}", flush=True)
    single, batched, early = ([one for _, one in sorted(found, key=lambda x: x[0])] for found in said.values())
    scores = [
        [row_score(row, one.text) for row, one in zip(rows, way, strict=True)] for way in (single, batched, early)
    ]
    result = {
        "rows": len(rows),
        "seconds": seconds,
        "ratio": {way: seconds[ALONE] / value for way, value in seconds.items()},
        "texts that differ": sum(a.text != b.text for a, b in zip(single, batched, strict=True)),
        "windows that differ": sum(a.window != b.window for a, b in zip(single, early, strict=True)),
        "scores that differ": sum(len({*three}) > 1 for three in zip(*scores, strict=True)),
        "stopped early": sum(one.ended == "settled" for one in early),
    }
    print("| way | seconds | x one at a time |\n|---|--:|--:|")
    for way, value in seconds.items():
        print(f"| {way} | {value:.1f} | {result['ratio'][way]:.2f} |")
    print(json.dumps(result))
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

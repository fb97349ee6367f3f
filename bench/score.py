"""How much faster scoring is than one row at a time, with the same outputs and the same numbers.

    .venv/bin/python bench/score.py LUME MODEL [--parts 4] [--batch-size 64] [--out score.json]

LUME is the folder with the dataset's public splits, MODEL a checkpoint folder. All validation rows are generated in three
ways, part by part and in turn: one row at a time by transformers' generate with its key-value cache, in batches, and in
batches that stop a row once its numbers can change no more, which is what `score` does. In float32 the first two must
agree to the letter, and all three in every row's score and window.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from neko_lean.data import read_rows
from neko_lean.modeling import load_model, load_tokenizer
from neko_lean.scoring.generation import Generation, generate
from neko_lean.scoring.task import row_score

WAYS = {
    "one row at a time": {"batch_size": 1, "stop_early": False},
    "batches": {"stop_early": False},
    "batches, stopping early": {"stop_early": True},
}


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
    said: dict[str, list[tuple[int, Generation]]] = {way: [] for way in WAYS}
    seconds = dict.fromkeys(WAYS, 0.0)
    for part in range(chosen.parts):
        some = list(range(part, len(rows), chosen.parts))
        for way, options in WAYS.items():
            start = time.perf_counter()
            settings = {"batch_size": chosen.batch_size, "max_new_tokens": chosen.max_new_tokens, **options}
            for batch in generate(lm, tokenizer, [rows[i] for i in some], **settings):
                said[way] += [(some[i], one) for i, one in batch]
            seconds[way] += time.perf_counter() - start
        print(f"part {part + 1} of {chosen.parts}: {seconds}", flush=True)
    alone, batched, early = ([one for _, one in sorted(found, key=lambda x: x[0])] for found in said.values())
    scores = [[row_score(row, one.text) for row, one in zip(rows, way, strict=True)] for way in (alone, batched, early)]
    result = {
        "rows": len(rows),
        "seconds": seconds,
        "ratio": {way: seconds["one row at a time"] / value for way, value in seconds.items()},
        "texts that differ": sum(a.text != b.text for a, b in zip(alone, batched, strict=True)),
        "windows that differ": sum(a.window != b.window for a, b in zip(alone, early, strict=True)),
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

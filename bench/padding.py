"""How much of a training step on LUME is padding: padded to the longest, in micro-batches by length, and packed.

    .venv/bin/python bench/padding.py LUME

Uses the lengths of real examples (train split) with a tokenizer trained on them, as bench/step.py does, for the first
200 steps of two recipes. Needs no model.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

from neko_lean.data.examples import read_rows
from neko_lean.data.tokenization import encode
from neko_lean.demo.base_model import write_base
from neko_lean.models.loading import load_tokenizer
from neko_lean.recipe import load_recipe
from neko_lean.training.micro_batches import micro_batches
from neko_lean.training.schedules import batches, phases

STEPS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lume", type=Path, help="folder with LUME's public splits")
    options = parser.parse_args()
    splits = {name: read_rows(options.lume, name, "train") for name in ("forget", "retain")}
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder), [*splits["forget"], *splits["retain"]], vocabulary=50280)
        tokenizer = load_tokenizer(Path(folder))
    for name in ("calibrated", "neko"):
        recipe, rng = load_recipe(name), random.Random(0)
        lengths = [
            [len(example) for example in encode(examples, tokenizer, recipe.format, recipe.max_length)]
            for examples in splits.values()
        ]
        order = batches(recipe, phases(recipe, *lengths, rng)[0], *lengths, rng)
        tokens = longest = 0
        positions, pieces = {False: 0, True: 0}, {False: 0, True: 0}  # padded, packed
        for _ in range(STEPS):
            forget, retain = next(order)
            step_lengths = [lengths[0][i] for i in forget] + [lengths[1][i] for i in retain]
            tokens += sum(step_lengths)
            longest += len(step_lengths) * max(step_lengths)
            for packed in (False, True):
                groups = micro_batches(step_lengths, recipe.micro_tokens, packed=packed)
                pieces[packed] += len(groups)
                sizes = [[step_lengths[i] for i in group] for group in groups]
                positions[packed] += sum(sum(size) if packed else len(size) * max(size) for size in sizes)
        print(
            f"{name}: {tokens / STEPS:.0f} tokens per step; padding: {1 - tokens / longest:.1%} padded to the longest, "
            f"{1 - tokens / positions[False]:.1%} in {pieces[False] / STEPS:.1f} micro-batches by length, "
            f"{1 - tokens / positions[True]:.1%} in {pieces[True] / STEPS:.1f} packed micro-batches"
        )


if __name__ == "__main__":
    main()

"""How much of a step is padding on LUME: rows padded to the longest, in micro-batches by length, and packed end to end.

    .venv/bin/python bench/padding.py ../shared/data/lume

Lengths of real rows (train split) by a tokenizer trained on them, as bench/step.py has it; the first 200 steps of two
recipes; no model.
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
from neko_lean.recipes import load_recipe
from neko_lean.training.batch import micro_batches
from neko_lean.training.schedules import batches, phases

STEPS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lume", type=Path, help="folder of LUME's parquet files")
    options = parser.parse_args()
    rows = {name: read_rows(options.lume, name, "train") for name in ("forget", "retain")}
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder), [*rows["forget"], *rows["retain"]], vocabulary=50280)
        tokenizer = load_tokenizer(Path(folder))
    for name in ("calibrated", "neko"):
        recipe, rng = load_recipe(name), random.Random(0)
        lengths = [
            [len(one) for one in encode(some, tokenizer, recipe.format, recipe.max_length)] for some in rows.values()
        ]
        order = batches(recipe, phases(recipe, *lengths, rng)[0], *lengths, rng)
        tokens = longest = 0
        positions, pieces = {False: 0, True: 0}, {False: 0, True: 0}  # padded, packed
        for _ in range(STEPS):
            forget, retain = next(order)
            some = [lengths[0][i] for i in forget] + [lengths[1][i] for i in retain]
            tokens += sum(some)
            longest += len(some) * max(some)
            for packed in (False, True):
                groups = micro_batches(some, recipe.micro_tokens, packed=packed)
                pieces[packed] += len(groups)
                sizes = [[some[i] for i in group] for group in groups]
                positions[packed] += sum(sum(one) if packed else len(one) * max(one) for one in sizes)
        print(
            f"{name}: {tokens / STEPS:.0f} tokens a step; padding {1 - tokens / longest:.1%} of rows padded to the "
            f"longest, {1 - tokens / positions[False]:.1%} of {pieces[False] / STEPS:.1f} micro-batches by length, "
            f"{1 - tokens / positions[True]:.1%} of {pieces[True] / STEPS:.1f} packed"
        )


if __name__ == "__main__":
    main()

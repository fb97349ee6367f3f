"""The largest step that a recipe can make."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from neko_lean.recipe import Recipe, forgets
from neko_lean.training import split_across_ranks


def largest_step(recipe: Recipe) -> list[tuple[int, int]]:
    """Micro-batches `(rows, length)` of the largest step of a recipe, in which every example has full length.

    Forget and retain examples share `batch_tokens` (see `data.paired_batches`), but one example of each set always
    fits. Substitutes come on top, one for each forget example, since `batch_tokens` does not count them.
    """
    length = recipe.max_length
    limits = {
        "forget": recipe.forget_rows if forgets(recipe) else 0,
        "retain": recipe.retain_rows if recipe.retain_objective != "none" else 0,
    }

    def rows_of(sets: Sequence[str]) -> int:
        # Without a forget objective, a forget example takes room for its substitute only, but may itself be short.
        trained = [name for name in sets if limits[name] and (name == "retain" or recipe.forget_objective != "none")]
        shared = min(sum(limits[name] for name in trained), max(len(trained), recipe.batch_tokens // length))
        return shared + (limits["forget"] if "forget" in sets and recipe.substitute != "none" else 0)

    steps = [["forget"], ["retain"]] if recipe.order == "alternating" else [["forget", "retain"]]
    rows = max(1, *map(rows_of, steps))

    rows_per_micro = max(1, recipe.micro_tokens // length) if recipe.backward == "layerwise" else rows
    return [(min(rows_per_micro, rows - start), length) for start in range(0, rows, rows_per_micro)]


def first_rank_share(micro: Sequence[tuple[int, int]], ranks: int) -> list[tuple[int, int]]:
    """The first rank's micro-batches of a step, split across `ranks` as training splits them."""
    starts = [0, *accumulate(rows for rows, _ in micro)]
    length = micro[0][1]
    groups = split_across_ranks([range(a, b) for a, b in pairwise(starts)], [length] * starts[-1], ranks)
    return [(len(group), length) if group else (1, 1) for group in groups[: len(groups) // ranks]]

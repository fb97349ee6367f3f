"""The learning rate of a run whose recipe says `lr = "auto"`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from neko_lean.models import load_config
from neko_lean.recipe import AUTO, Recipe
from neko_lean.terminal import log_line

# Learning rate times hidden size, for all weights. Adam moves each weight by about lr, and a layer adds up as many
# products as it has inputs, so its output moves by lr * hidden size (muP, arXiv 2203.03466, table 3).
LR_TIMES_WIDTH = 0.077
# For adapters: what QLoRA used from 7 to 13 billion parameters (arXiv 2305.14314, appendix B).
ADAPTER_LR = 2e-4


def with_learning_rate(recipe: Recipe, folder: Path, quiet: bool = False) -> Recipe:
    """The recipe with a number as its learning rate.

    Args:
        recipe: the run's recipe.
        folder: the checkpoint to train, for the hidden size in its config.json.
        quiet: whether to log nothing.
    """
    if recipe.lr != AUTO:
        return recipe
    if recipe.lora_rank:
        lr, reason = ADAPTER_LR, "for adapters"
    else:
        width = load_config(folder).get_text_config(decoder=True).hidden_size
        lr, reason = float(f"{LR_TIMES_WIDTH / width:.1e}"), f"for hidden size {width}"
    log_line(f"lr = {lr:.1e} ({reason})", quiet)
    return dataclasses.replace(recipe, lr=lr)

"""The learning rate of a run whose recipe says `lr = "auto"`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from neko_lean.errors import NekoLeanError
from neko_lean.models import load_config
from neko_lean.recipe import AUTO, Recipe

# Learning rate times hidden size, for all weights. Adam moves each weight by about lr, and a layer adds up as many
# products as it has inputs, so its output moves by lr * hidden size (muP, arXiv 2203.03466, table 3).
LR_TIMES_WIDTH = 0.077
# Adapters train at ten times that rate: docs/adapters.md at 2.5 million parameters, and QLoRA (arXiv 2305.14314,
# appendix B), whose rates from 7 to 65 billion parameters (2e-4 to 1e-4) follow it too.
ADAPTER_FACTOR = 10


def with_learning_rate(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with a number as its learning rate.

    Args:
        recipe: the run's recipe.
        folder: the checkpoint to train, for the hidden size in its config.json.

    Raises:
        NekoLeanError: the config lacks a hidden size.
    """
    if recipe.lr != AUTO:
        return recipe
    width = getattr(load_config(folder).get_text_config(decoder=True), "hidden_size", None)
    if not width:
        raise NekoLeanError(f"{folder / 'config.json'} names no hidden_size, which lr 'auto' follows; set --lr.")
    factor = ADAPTER_FACTOR if recipe.lora_rank else 1
    lr = float(f"{factor * LR_TIMES_WIDTH / width:.1e}")
    return dataclasses.replace(recipe, lr=lr)

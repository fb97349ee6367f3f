"""Two processes for test_sharding.py: gradients of a student in shards beside plain autograd's, both in float64.

torchrun ... tests/sharded.py FOLDER    where FOLDER holds world and cache; prints JSON
"""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from neko_lean.cache.reader import TeacherCache
from neko_lean.data.examples import read_rows
from neko_lean.data.substitutes import refusals
from neko_lean.data.tokenization import encode
from neko_lean.distributed.collectives import raise_on_any_rank, with_process_group
from neko_lean.distributed.ranks import as_single_process, is_main_process
from neko_lean.models.causal_lm import as_causal_lm
from neko_lean.models.loading import load_tokenizer
from neko_lean.models.sharding import ShardedModel
from neko_lean.recipes import load_recipe
from neko_lean.training.batch import make_batch, select_hidden
from neko_lean.training.layers import decoder_layers
from neko_lean.training.layerwise import LayerPass
from neko_lean.training.losses import batch_losses

# Heads of 7 rows a rank and less: 355 rows of the vocabulary do not split evenly either.
SHAPE = {"hidden_size": 28, "intermediate_size": 30, "num_hidden_layers": 3, "num_attention_heads": 2}
RECIPES = [
    ("neko", {}),
    ("npo", {}),
    ("dpo", {"substitute": "refusal"}),
    ("calibrated", {"level": 3.0}),
    ("graddiff", {"micro_tokens": 10_000}),  # one micro-batch, which is cut in two
    ("neko", {"retain_objective": "none", "micro_tokens": 20}),
    ("mlp", {}),
]


def student(vocabulary: int, tied: bool):
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=tied, attn_implementation="eager", **SHAPE)
    return as_causal_lm(LlamaForCausalLM(config).double())


def compare(root: Path, name: str, change: dict, tied: bool) -> float:
    """The largest difference of a gradient, relative to the largest of its parameter."""
    tokenizer = load_tokenizer(root / "world" / "base")
    recipe = load_recipe(name, {"micro_tokens": 60, "format": "neko", **change})
    forget, retain = (read_rows(root / "world", stem)[:count] for stem, count in (("forget", 3), ("retain", 4)))
    sets = [encode(rows, tokenizer, "neko", 512) for rows in (forget, retain, refusals(forget))]
    others = sets[2] if change.get("substitute") else []
    cache = TeacherCache(root / "cache")
    given = (sets[0], sets[1] if recipe.retain_objective != "none" else [], cache, recipe, 0)

    with as_single_process():
        plain = student(len(tokenizer), tied)
        batch = make_batch(*given, torch.device("cpu"), others)
        loss = batch_losses(select_hidden(plain, batch.micro), plain, batch, recipe)["loss"]
        loss.backward()
        wanted = {name: p.grad for name, p in plain.model.named_parameters()}

    spread = student(len(tokenizer), tied)
    layers = decoder_layers(spread)
    shards = ShardedModel(spread, layers, torch.device("cpu"))
    walk = LayerPass(spread, layers, shards=shards)
    learning = dict(spread.model.named_parameters())
    worst = 0.0
    for _ in range(2):  # the second time from what the first has left
        batch = make_batch(*given, torch.device("cpu"), others)
        same = batch_losses(walk.forward(batch.on_this_rank()[0]), spread, batch, recipe)["loss"]
        same.backward()
        walk.backward(lambda parameter: None)
        worst = max(worst, abs(same.item() - loss.item()))
        for name, parameter in learning.items():
            got = parameter.grad.full_tensor()
            worst = max(worst, ((got - wanted[name]).abs().max() / wanted[name].abs().max()).item())
            parameter.grad = None
    return worst


@with_process_group()
def main(root: Path) -> None:
    found = {}
    for tied in (False, True):
        for number, (name, change) in enumerate(RECIPES):
            found[f"{number} {name}, {'tied' if tied else 'untied'}"] = max(
                raise_on_any_rank(lambda n=name, c=change, t=tied: compare(root, n, c, t))
            )
    if is_main_process():
        print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # as neko_lean.cli.main ends, and for its reason

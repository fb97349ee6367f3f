"""Run by test_sharding.py under torchrun: compares the gradients of a sharded student with those of plain autograd.

    torchrun ... tests/sharded.py FOLDER

FOLDER contains world and cache. Prints the largest relative difference in float64 for each recipe, as JSON. With
adapters, it includes the difference between the checkpoints that both models save.
"""

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from neko_lean.cache.reader import TeacherCache
from neko_lean.data.examples import read_rows
from neko_lean.data.substitutes import refusals
from neko_lean.data.tokenization import encode
from neko_lean.distributed.collectives import raise_on_any_rank, with_process_group
from neko_lean.distributed.ranks import as_single_process, is_main_process
from neko_lean.models.causal_lm import CausalLM, as_causal_lm
from neko_lean.models.loading import load_tokenizer
from neko_lean.models.quantized_base import quantized_parameters
from neko_lean.models.sharding import ShardedModel, save_checkpoint
from neko_lean.recipe import Recipe, load_recipe
from neko_lean.training.batch import make_batch, select_hidden
from neko_lean.training.layers import decoder_layers, prepare_student
from neko_lean.training.layerwise import LayerPass
from neko_lean.training.losses import batch_losses

# Two ranks cannot divide these weights evenly: each has at most 7 rows of a head, and the vocabulary has 355 rows.
SHAPE = {"hidden_size": 28, "intermediate_size": 30, "num_hidden_layers": 3, "num_attention_heads": 2}
# Weights of a multiple of 64 elements, which nf4 needs, with biases, which are sharded.
QUANTIZABLE = {**SHAPE, "hidden_size": 32, "attention_bias": True}
RECIPES = [
    ("neko", {}),
    ("npo", {}),
    ("dpo", {"substitute": "refusal"}),
    ("calibrated", {"level": 3.0}),
    ("graddiff", {"micro_tokens": 10_000}),  # a single micro-batch, which is divided between the ranks
    ("neko", {"retain_objective": "none", "micro_tokens": 20}),
    ("mlp", {}),
    ("neko", {"lora_rank": 3}),
    ("neko", {"lora_rank": 3, "quantize_base": "nf4"}),
    ("calibrated", {"level": 3.0, "lora_rank": 3, "quantize_base": "int8"}),
]
CPU = torch.device("cpu")


def random_student(vocab_size: int, tied: bool, recipe: Recipe, dtype: torch.dtype = torch.float64):
    torch.manual_seed(1)
    shape = SHAPE if recipe.quantize_base == "none" else QUANTIZABLE
    config = LlamaConfig(vocab_size=vocab_size, tie_word_embeddings=tied, attn_implementation="eager", **shape)
    lm = as_causal_lm(LlamaForCausalLM(config).to(dtype))
    prepare_student(lm, recipe, CPU)
    assert bool(quantized_parameters(lm.model)) == (recipe.quantize_base != "none")
    for name, parameter in lm.model.named_parameters():
        if ".lora_B." in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return lm


def largest_difference(root: Path, recipe_name: str, overrides: dict, tied: bool) -> float:
    """The largest difference of a gradient, relative to the largest gradient of the same parameter."""
    tokenizer = load_tokenizer(root / "world" / "base")
    recipe = load_recipe(recipe_name, {"micro_tokens": 60, "format": "neko", **overrides})
    forget, retain = read_rows(root / "world", "forget")[:3], read_rows(root / "world", "retain")[:4]
    substitutes = refusals(forget) if overrides.get("substitute") else []
    if recipe.retain_objective == "none":
        retain = []
    forget, retain, substitutes = (encode(rows, tokenizer, "neko", 512) for rows in (forget, retain, substitutes))
    cache = TeacherCache(root / "cache")

    # A single process with plain autograd.
    with as_single_process():
        plain = random_student(len(tokenizer), tied, recipe)
        batch = make_batch(forget, retain, cache, recipe, 0, CPU, substitutes)
        plain_loss = batch_losses(select_hidden(plain, batch.micro), plain, batch, recipe)["loss"]
        plain_loss.backward()
        plain_gradients = {name: parameter.grad for name, parameter in plain.model.named_parameters()}

    # The sharded student, layer by layer.
    sharded = random_student(len(tokenizer), tied, recipe)
    layers = decoder_layers(sharded)
    layer_pass = LayerPass(sharded, layers, shards=ShardedModel(sharded, layers, CPU))
    parameters = dict(sharded.model.named_parameters())
    quantized = quantized_parameters(sharded.model)
    assert all(isinstance(parameter, DTensor) != (parameter in quantized) for parameter in parameters.values())
    worst = 0.0
    for _ in range(2):  # the second pass must not depend on what the first one leaves behind
        batch = make_batch(forget, retain, cache, recipe, 0, CPU, substitutes)
        loss = batch_losses(layer_pass.forward(batch.on_this_rank()[0]), sharded, batch, recipe)["loss"]
        loss.backward()
        layer_pass.backward(lambda parameter: None)

        worst = max(worst, abs(loss.item() - plain_loss.item()))
        for name, parameter in parameters.items():
            if not parameter.requires_grad:
                continue
            expected = plain_gradients[name]
            difference = (parameter.grad.full_tensor() - expected).abs().max() / expected.abs().max()
            worst = max(worst, difference.item())
            parameter.grad = None
    return max(worst, checkpoint_difference(root, plain, sharded)) if recipe.lora_rank else worst


def checkpoint_difference(root: Path, plain: CausalLM, sharded: CausalLM) -> float:
    """The largest difference of a weight in the checkpoints of two models, relative to the largest weight."""
    tokenizer = load_tokenizer(root / "world" / "base")
    with TemporaryDirectory() as folder:
        save_checkpoint(sharded, tokenizer, Path(folder) / "sharded", adapter_of="base")
        if not is_main_process():
            return 0.0
        with as_single_process():
            save_checkpoint(plain, tokenizer, Path(folder) / "plain", adapter_of="base")

        worst = 0.0
        for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
            actual, expected = (load_file(Path(folder) / kind / name) for kind in ("sharded", "plain"))
            assert actual.keys() == expected.keys()
            for key, weight in expected.items():
                worst = max(worst, ((actual[key] - weight).abs().max() / weight.abs().max()).item())
    return worst


@with_process_group()
def main(root: Path) -> None:
    worst = {}
    for tied in (False, True):
        for number, (recipe_name, overrides) in enumerate(RECIPES):
            worst[f"{number} {recipe_name}, {'tied' if tied else 'untied'}"] = max(
                raise_on_any_rank(lambda n=recipe_name, o=overrides, t=tied: largest_difference(root, n, o, t))
            )
    if is_main_process():
        print(json.dumps(worst))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # for the reason given in neko_lean.cli.main

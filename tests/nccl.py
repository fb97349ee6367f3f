"""Run by test_sharding.py under torchrun with one rank on a GPU: a sharded student against plain autograd, over NCCL.

    torchrun --nproc-per-node 1 tests/nccl.py

A command with a single rank connects to no group, so this script connects as commands with several ranks do. Prints the
largest relative difference of a gradient in float32, and the backend of CUDA tensors, as JSON.
"""

import json
import os
import sys

import torch
import torch.distributed as dist

from neko_lean.models.sharding import ShardedModel
from neko_lean.recipe import Recipe, load_recipe
from neko_lean.training.batch import select_hidden
from neko_lean.training.layers import decoder_layers
from neko_lean.training.layerwise import LayerPass
from neko_lean.training.micro_batches import MicroBatches
from tests.sharded import random_student

VOCABULARY = 355


def main(device: torch.device, recipe: Recipe) -> float:
    """The largest difference of a gradient, relative to the largest gradient of the same parameter."""
    ids = [torch.randint(0, VOCABULARY, shape, device=device) for shape in ((3, 9), (2, 14))]
    index = [torch.arange(0, tensor.numel(), 2, device=device) for tensor in ids]
    micro = MicroBatches(ids, [None, None], index)

    plain = random_student(VOCABULARY, tied=False, recipe=recipe, dtype=torch.float32)
    plain.model.to(device)
    (select_hidden(plain, micro) @ plain.head.T).logsumexp(1).mean().backward()
    expected = {name: parameter.grad for name, parameter in plain.model.named_parameters()}

    sharded = random_student(VOCABULARY, tied=False, recipe=recipe, dtype=torch.float32)
    layers = decoder_layers(sharded)
    layer_pass = LayerPass(sharded, layers, shards=ShardedModel(sharded, layers, device))
    parameters = dict(sharded.model.named_parameters())
    hidden = layer_pass.forward(micro)
    (hidden @ sharded.head.T).logsumexp(1).mean().backward()
    layer_pass.backward(lambda parameter: None)
    return max(
        float((parameter.grad.full_tensor() - expected[name]).abs().max() / expected[name].abs().max())
        for name, parameter in parameters.items()
        if parameter.requires_grad
    )


if __name__ == "__main__":
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    qlora = {"lora_rank": 3, "quantize_base": "nf4"}
    difference = max(main(device, load_recipe("neko", change)) for change in ({}, qlora))
    backend = dist.get_backend_config().split("cuda:")[-1].split(",")[0] if device.type == "cuda" else "gloo"
    print(json.dumps({"difference": difference, "backend": backend}))
    sys.stdout.flush()
    os._exit(0)  # for the reason given in neko_lean.cli.main

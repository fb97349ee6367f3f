"""Fully sharded models: each rank holds a shard of every plain parameter and unshards one layer at a time.

FSDP2 (`fully_shard`) shards and unshards. The backward pass is driven by LayerPass instead of FSDP's hooks, one layer
at a time over all micro-batches: a layer is unsharded once and its gradients are reduce-scattered once, however many
micro-batches there are. Each rank then updates its shard with its shard of Adam's state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard

from neko_lean.distributed import is_main_process, world_size
from neko_lean.errors import NekoLeanError
from neko_lean.models.adapters import has_adapters, merged_weights, save_adapter
from neko_lean.models.causal_lm import CausalLM
from neko_lean.models.generation_config import save_model
from neko_lean.models.quantized_base import dequantize_base, quantized_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Folder of a checkpoint that holds its adapters on their own.
ADAPTER = "adapter"


def check_sharding() -> None:
    """Raise NekoLeanError if the installed torch is too old to shard a model across ranks."""
    if not hasattr(FSDPModule, "reset_iter_state"):
        raise NekoLeanError(
            f"training across ranks needs torch 2.13 or newer, but torch {torch.__version__} is installed; upgrade "
            f"it, or run without torchrun."
        )


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor (a DTensor); other tensors are returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save_checkpoint(
    lm: CausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, adapter_of: str | None = None
) -> None:
    """Save model and tokenizer into a folder. All ranks must call it; the main process gathers the weights and writes.

    Adapters are merged in place, and a quantised base is dequantised, so a model with adapters must not run again.

    Args:
        lm: the model.
        tokenizer: its tokenizer.
        folder: the folder to write to.
        adapter_of: if given, the adapters are also saved, in the folder `adapter`, as those of the model of this name.
    """
    adapted = has_adapters(lm)
    if adapted and is_main_process():
        # The other ranks do not need the dequantised weights, because a quantised weight is never sharded.
        dequantize_base(lm, torch.device("cpu"))
    weights = _whole_weights(lm) if world_size() > 1 or adapted else None
    if is_main_process():
        if weights is not None and adapter_of is not None:
            save_adapter(lm, weights, adapter_of, folder / ADAPTER)
        if weights is not None and adapted:
            weights = merged_weights(lm, weights)
        save_model(lm.model, lambda: lm.model.save_pretrained(folder, state_dict=weights), folder)
        tokenizer.save_pretrained(folder)


def _whole_weights(lm: CausalLM) -> dict[str, Tensor]:
    """All weights by name; with several ranks, gathered in host memory on the main process."""
    if world_size() == 1:
        return lm.model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict  # takes seconds

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = cast("dict[str, Tensor]", get_model_state_dict(lm.model, options=options))

    # Each name of a tied weight was gathered by itself, but a weight is written once only if its names share it.
    names: dict[nn.Parameter, str] = {}
    for name, parameter in lm.model.named_parameters(remove_duplicate=False):
        if name in weights:
            weights[name] = weights[names.setdefault(parameter, name)]
    return weights


class ShardedModel:
    """A model whose parameters are sharded over all ranks by rows, as DTensors.

    Each layer is one FSDP group, and so is an untied head. The root group, `lm.model`, holds the rest: the embedding
    and the final norm. Quantised weights are not sharded: each rank has all of them.

    Args:
        lm: the model, unsharded on the CPU; it is sharded in place.
        layers: its decoder layers.
        device: the type of device that holds the shards.
    """

    def __init__(self, lm: CausalLM, layers: Iterable[nn.Module], device: torch.device) -> None:
        self.lm = lm
        self.mesh = init_device_mesh(device.type, (world_size(),))

        # Codes of quantised weights are frozen and small, and those of nf4 are not stored by rows.
        quantized = quantized_parameters(lm.model)
        for parameter in quantized:
            parameter.data = parameter.data.to(device)
        shard = partial(fully_shard, mesh=self.mesh, ignored_params=quantized)

        for layer in layers:
            shard(layer)
        # The head is a separate group, because FSDP briefly holds twice what it unshards. Its forward never runs: the
        # loss reads the weight.
        head = cast(nn.Module, lm.model.get_output_embeddings())
        self.head = None if head.weight is lm.embedding else shard(head)
        shard(lm.model)
        self.root = cast(FSDPModule, lm.model)

        # FSDP makes the module that runs first the root.
        with torch.no_grad():
            lm.model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False)
        self.reset()

        # The sharded parameters of each group, by name: unsharding replaces them in their modules.
        self.shards: dict[nn.Module, dict[str, nn.Parameter]] = {
            module: dict(module.named_parameters()) for module in (*layers, lm.model)
        }

    def unshard(self) -> None:
        """Unshard embedding and final norm, for `lm.hidden`; each layer is unsharded when it is called."""
        self.root.unshard()

    def unshard_head(self) -> None:
        """Unshard the head."""
        if self.head is not None:
            self.head.unshard()

    def reshard(self) -> None:
        """Reshard embedding, final norm and head, in the middle of a pass."""
        self.root.reshard()
        if self.head is not None:
            self.head.reshard()

    def reset(self) -> None:
        """Reshard everything and clear what FSDP recorded during a forward pass."""
        self.root.reset_iter_state()

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Context in which embedding, final norm and head are unsharded."""
        self.unshard()
        self.unshard_head()
        try:
            yield
        finally:
            self.reset()

    @contextmanager
    def unsharded_layer(self, layer: nn.Module) -> Iterator[None]:
        """Context in which one layer is unsharded, for `layer.forward`; its gradients are reduce-scattered at the
        end."""
        group = cast(FSDPModule, layer)
        group.unshard()
        yield
        self.reduce_scatter_grads(layer)
        group.reshard()

    def reduce_scatter_grads(self, module: nn.Module, skip: Tensor | None = None) -> None:
        """Reduce-scatter the gradients of an unsharded module: sum them over ranks, and give each rank its rows.

        Args:
            module: an unsharded module.
            skip: a parameter whose gradient is left for a later `reduce_scatter_grad`.
        """
        for name, parameter in module.named_parameters():
            shard = self.shards[module][name]
            if parameter is not shard and parameter is not skip:
                self.reduce_scatter_grad(parameter, shard)

    def reduce_scatter_grad(self, parameter: Tensor, shard: Tensor) -> None:
        """Reduce-scatter the gradient of one parameter, which may have been resharded since, into `shard.grad`."""
        if parameter.grad is not None:
            summed = DTensor.from_local(parameter.grad, self.mesh, [Partial()], run_check=False)
            parameter.grad = None
            shard.grad = summed.redistribute(self.mesh, [Shard(0)])

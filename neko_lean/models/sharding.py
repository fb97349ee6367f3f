"""A student spread over the ranks: each holds a part of every weight, and a layer is gathered where it is needed.

FSDP2 (`fully_shard`) does the spreading and the gathering. What it would do by hooks on the way back, LayerPass does
itself, one layer at a time over all micro-batches: so a layer is gathered once and its gradients are reduced once,
however many micro-batches there are, and each rank then steps its part with its part of Adam's state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard

from neko_lean.distributed import is_main_process, world_size
from neko_lean.models.causal_lm import CausalLM
from neko_lean.models.generation_config import save_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is spread over the ranks: its rows, the first rank's first. Else itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class ShardedModel:
    """Spread `lm`, which lies whole on the CPU, over the ranks' devices of type `device`.

    Its layers are groups of their own, an untied head is one, and the rest, embedding and final norm, is one more,
    `lm.model`. Parameters that are not gathered are DTensors, sharded by rows.
    """

    def __init__(self, lm: CausalLM, layers: Iterable[nn.Module], device: torch.device) -> None:
        self.lm = lm
        self.mesh = init_device_mesh(device.type, (world_size(),))
        for layer in layers:
            fully_shard(layer, mesh=self.mesh)
        head = cast(nn.Module, lm.model.get_output_embeddings())
        # Apart, as FSDP holds twice what it gathers for a moment. Its forward never runs: the loss takes the weight.
        self.head = None if head.weight is lm.embedding else fully_shard(head, mesh=self.mesh)
        fully_shard(lm.model, mesh=self.mesh)
        with torch.no_grad():  # FSDP takes for its root what runs first
            lm.model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False)
        self.root = cast(FSDPModule, lm.model)
        self.parts: dict[nn.Module, dict[str, nn.Parameter]] = {}
        self.reset()
        for module in (*layers, lm.model):
            self.parts[module] = dict(module.named_parameters())

    def unshard(self) -> None:
        """Have embedding and final norm whole, for `lm.hidden`; each layer gathers itself when it is called."""
        self.root.unshard()

    def unshard_head(self) -> None:
        """Have the head whole, too."""
        if self.head is not None:
            self.head.unshard()

    def reshard(self) -> None:
        """The opposite of both, in the middle of a pass."""
        self.root.reshard()
        if self.head is not None:
            self.head.reshard()

    def reset(self) -> None:
        """Keep no more than this rank's part of anything; forget what FSDP noted down of a forward pass."""
        self.root.reset_iter_state()

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Embedding, final norm and head are whole while it lasts."""
        self.unshard()
        self.unshard_head()
        try:
            yield
        finally:
            self.reset()

    @contextmanager
    def unsharded_layer(self, layer: nn.Module) -> Iterator[None]:
        """One layer is whole while it lasts, for `layer.forward`; then its gradients are `reduce`d."""
        group = cast(FSDPModule, layer)
        group.unshard()
        yield
        self.reduce_scatter_grads(layer)
        group.reshard()

    def reduce_scatter_grads(self, module: nn.Module, skip: Tensor | None = None) -> None:
        """Add up the ranks' gradients of a module whose weights are whole, and give each rank its rows of the sum as
        the gradient of its part. `skip` is a parameter whose gradient is to stay for later."""
        for name, full in module.named_parameters():
            part = self.parts[module][name]
            if full is not part and full is not skip:
                self.reduce_scatter_grad(full, part)

    def reduce_scatter_grad(self, full: Tensor, part: Tensor) -> None:
        """`reduce` of one parameter, which need no longer be whole."""
        if full.grad is not None:
            summed = DTensor.from_local(full.grad, self.mesh, [Partial()], run_check=False)
            full.grad = None
            part.grad = summed.redistribute(self.mesh, [Shard(0)])


def save_checkpoint(lm: CausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer into a folder. Ranks all have to call it; the first one collects and writes."""
    weights = None
    if world_size() > 1:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(lm.model, options=options)
    if is_main_process():
        save_model(lm.model, lambda: lm.model.save_pretrained(folder, state_dict=weights), folder)
        tokenizer.save_pretrained(folder)

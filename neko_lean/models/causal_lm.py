"""Load a causal language model's parts: folder, tokenizer, student, backbone and head; and say what it is.

Everything is read from safetensors in a local folder; a hub name is fetched into the hub's own cache first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neko_lean.data import pad
from neko_lean.errors import NekoLeanError
from neko_lean.models.families import backbone_of, linear_head, logit_transform, plain_outputs
from neko_lean.models.positions import (
    embeddable_positions,
    refuse_sight_of_later_tokens,
)
from neko_lean.models.token_stats import LogitTransform, TokenViews, logits, token_stats, token_views
from neko_lean.models.trust import reason

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class CausalLM:
    """A model split where training splits it: `backbone` computes hidden states, `head` and `transform` logits.

    Args:
        model: the whole model.
        backbone: the part of it whose last hidden states the head takes.
        scale, softcap: of `transform`, see `head.LogitTransform`.
        max_positions: the longest row that the model can embed; None: no table of positions sets a limit.
    """

    model: PreTrainedModel
    backbone: nn.Module
    scale: float = 1.0
    softcap: float | None = None
    max_positions: int | None = None

    @property
    def head(self) -> Tensor:
        """The [V, d] weight of the output embedding."""
        return cast(Tensor, self._output_embedding.weight)

    @property
    def transform(self) -> LogitTransform:
        """What turns `hidden @ head.T` into logits."""
        return LogitTransform(cast("Tensor | None", self._output_embedding.bias), self.scale, self.softcap)

    @property
    def _output_embedding(self) -> nn.Module:
        # Asked for at each use: FSDP replaces parameters when it gathers them.
        return cast(nn.Module, self.model.get_output_embeddings())

    @property
    def device(self) -> torch.device:
        return self.head.device

    @property
    def embedding(self) -> Tensor:
        """The [V, d] weight of the input embedding; `head` itself where the two are tied."""
        return cast(Tensor, self.model.get_input_embeddings().weight)

    def hidden(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Last hidden states [B, L, d] after the final norm, for right-padded ids [B, L]; or [1, L, d] for rows packed
        end to end, with `places` [1, L] int64, each token's position in its own row, where the model `packs`.

        No mask is needed: attention is causal, so a real position never sees the padding behind it, and without a mask
        the attention kernel skips the upper triangle instead of reading it.
        """
        if position_ids is None and self.max_positions is not None and input_ids.shape[1] > self.max_positions:
            raise NekoLeanError(
                f"a row of {input_ids.shape[1]} tokens is longer than the {self.max_positions} positions of "
                f"{type(self.model).__name__}: lower max_length."
            )
        more = {} if position_ids is None else {"position_ids": position_ids}
        try:
            hidden: Tensor = self.backbone(input_ids=input_ids, use_cache=False, **more).last_hidden_state
        except (NekoLeanError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of the family's own code, such as a dtype or a length that it does not know
            raise NekoLeanError(
                f"the forward pass of {type(self.model).__name__} fails on rows of {input_ids.shape[1]} tokens in "
                f"{str(self.head.dtype).removeprefix('torch.')} ({reason(error)}): try another dtype or max_length."
            ) from error
        return hidden.to(self.head.dtype)  # Mamba keeps its residual stream in float32

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [c, V] in float32 (float64 for float64) of last hidden states [c, d], without gradient."""
        return logits(hidden, self.head, self.transform)


@torch.no_grad()
def next_token_logp(lm: CausalLM, rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Log-probability of every token but the first of each row, row after row: [sum of (length - 1)] float32."""
    input_ids, mask = pad(rows, pad_id, lm.device)
    real = mask[:, 1:].bool()  # [B, L - 1]
    hidden = lm.hidden(input_ids)[:, :-1][real]
    target_logp: Tensor = token_stats(hidden, lm.head, input_ids[:, 1:][real], transform=lm.transform)[0]
    return target_logp


@torch.no_grad()
def next_token_views(lm: CausalLM, rows: Sequence[Sequence[int]], pad_id: int) -> list[TokenViews]:
    """What the model thinks of every token but the first of each row: one TokenViews a row, [length - 1] each."""
    input_ids, mask = pad(rows, pad_id, lm.device)
    real = mask[:, 1:].bool()  # [B, L - 1]
    hidden = lm.hidden(input_ids)[:, :-1][real]
    views = token_views(hidden, lm.head, input_ids[:, 1:][real], lm.transform)
    columns = [column.split([len(row) - 1 for row in rows]) for column in views]
    return [TokenViews(*one) for one in zip(*columns, strict=True)]


@torch.no_grad()
def as_causal_lm(model: PreTrainedModel) -> CausalLM:
    """Find how a model's logits follow from its hidden states, and check that they do and that its attention is causal.

    Raises NekoLeanError for families of which either is not so.
    """
    family = type(model).__name__
    linear_head(model)
    plain_outputs(model)
    was_training = model.training
    model.eval()
    try:
        backbone = backbone_of(model)
        scale, softcap = logit_transform(model, backbone)
        lm = CausalLM(model, backbone, scale, softcap, embeddable_positions(model, model.config))
        probe = torch.arange(4, device=lm.device)[None] % len(lm.head)  # [1, 4]
        wanted = model(input_ids=probe, use_cache=False).logits[0].float()  # [4, V]
        got = lm.logits(lm.hidden(probe)[0])  # [4, V]
        refuse_sight_of_later_tokens(model, lm.hidden)
    finally:
        model.train(was_training)
    tolerance = 0.02 if lm.head.dtype == torch.bfloat16 else 1e-4
    # Where the model's own logits are NaN or infinite, later checks name the row.
    if wanted.isfinite().all() and not (wanted - got).abs().max() <= tolerance * (1 + wanted.abs().max()):
        raise NekoLeanError(f"{family} is not supported: its logits do not follow from its last hidden states.")
    return lm


def position_limit(lm: CausalLM, wanted: int) -> int:
    """The longest row that the model can embed, at most `wanted` tokens."""
    return min(wanted, lm.max_positions or wanted)


@torch.no_grad()
def supports_packing(lm: CausalLM) -> bool:
    """Whether rows of a micro-batch may lie end to end as one [1, L], `hidden` being given their places.

    Only where the attention kernel takes rows of any length (FlashAttention's own package, FlexAttention): elsewhere
    keeping rows apart takes a mask [L, L], and with one SDPA leaves its flash kernel. And only where the model is seen
    to keep them apart: two rows packed are what each is alone, and one does not change with what lies before it.
    """
    kernel = str(lm.model.config._attn_implementation)
    return ("flash" in kernel or kernel == "flex_attention") and keeps_packed_rows_apart(lm)


@torch.no_grad()
def keeps_packed_rows_apart(lm: CausalLM) -> bool:
    """Whether two packed rows are what each is alone, and one does not change with what lies before it."""
    was_training = lm.model.training
    lm.model.eval()
    one, other, two = (torch.arange(n, n + 24, device=lm.device)[None] % len(lm.head) for n in (0, 24, 48))  # [1, 24]
    position_ids = torch.arange(24, device=lm.device).repeat(2)[None]  # [1, 48]
    try:
        packed = lm.hidden(torch.cat([one, two], 1), position_ids).float()
        changed = lm.hidden(torch.cat([other, two], 1), position_ids).float()
        alone = torch.cat([lm.hidden(one), lm.hidden(two)], 1).float()
    except NekoLeanError:  # it takes no positions, or its kernel does not run here
        return False
    finally:
        lm.model.train(was_training)
    tolerance = 0.02 if lm.head.dtype == torch.bfloat16 else 1e-4
    near = bool((packed - alone).abs().max() <= tolerance * (1 + alone.abs().max()))
    return near and torch.equal(packed[:, 24:], changed[:, 24:])


def checkpoint_activations(model: nn.Module) -> list[nn.Module]:
    """Keep only each layer's input for the backward pass and compute the rest again there; returns those layers.

    transformers' own switch works in training mode only, in which dropout is on as well; this one works in both.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[nn.Module] = []
    inside: set[nn.Module] = set()  # of a layer that is checkpointed already
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            inside.update(module.modules())
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
            layers.append(module)
    return layers

"""CausalLM: a transformers model as training sees it, a backbone that computes hidden states and a head."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neko_lean.errors import NekoLeanError
from neko_lean.models.families import detect_logit_transform, find_backbone, linear_head, reset_output_switches
from neko_lean.models.lm_head import LogitTransform, logits
from neko_lean.models.positions import embeddable_positions, refuse_non_causal
from neko_lean.models.trust import reason

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class CausalLM:
    """A causal language model, split into the backbone and the head.

    Args:
        model: the whole transformers model.
        backbone: the submodule whose last hidden states are the input of the head.
        scale, softcap: parameters of `transform`, see LogitTransform.
        max_positions: length in tokens of the longest sequence that the model can embed; None if nothing limits it.
    """

    model: PreTrainedModel
    backbone: nn.Module
    scale: float = 1.0
    softcap: float | None = None
    max_positions: int | None = None

    @property
    def head(self) -> Tensor:
        """Weight of the output embedding, [V, d]."""
        return cast(Tensor, self._output_embedding.weight)

    @property
    def transform(self) -> LogitTransform:
        """The function from `hidden @ head.T` [N, V] to logits [N, V]."""
        return LogitTransform(cast("Tensor | None", self._output_embedding.bias), self.scale, self.softcap)

    @property
    def _output_embedding(self) -> nn.Module:
        # Looked up at each use, because FSDP replaces parameters when it unshards them.
        return cast(nn.Module, self.model.get_output_embeddings())

    @property
    def device(self) -> torch.device:
        """The device of the head."""
        return self.head.device

    @property
    def embedding(self) -> Tensor:
        """Weight of the input embedding, [V, d]; the same tensor as `head` if the two are tied."""
        return cast(Tensor, self.model.get_input_embeddings().weight)

    def hidden(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Compute the last hidden states, after the final norm.

        No attention mask is needed: attention is causal, so tokens never see the padding to their right. Without a
        mask the attention kernel skips the upper triangle instead of reading it.

        Args:
            input_ids: [B, L] int64, right-padded sequences; or [1, L], several sequences packed into one row, if
                `supports_packing` is true for the model.
            position_ids: [1, L] int64, the position of each token in its own sequence; only for packed sequences.

        Returns:
            [B, L, d] in the dtype of the head.

        Raises:
            NekoLeanError: the sequences are longer than `max_positions`, or the model's forward pass fails.
        """
        length, family = input_ids.shape[1], type(self.model).__name__
        if position_ids is None and self.max_positions is not None and length > self.max_positions:
            raise NekoLeanError(
                f"a row has {length} tokens, but {family} has only {self.max_positions} positions; set max_length to "
                f"at most {self.max_positions}."
            )
        kwargs = {} if position_ids is None else {"position_ids": position_ids}
        try:
            hidden: Tensor = self.backbone(input_ids=input_ids, use_cache=False, **kwargs).last_hidden_state
        except (NekoLeanError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # modeling code raises any type, for example for a dtype that it does not support
            dtype = str(self.head.dtype).removeprefix("torch.")
            raise NekoLeanError(
                f"the forward pass of {family} fails for rows of {length} tokens in {dtype} ({reason(error)}); try "
                f"another dtype or a smaller max_length."
            ) from error
        return hidden.to(self.head.dtype)  # Mamba keeps its residual stream in float32

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [c, V] of last hidden states [c, d], in float32 (float64 for float64), without gradient."""
        return logits(hidden, self.head, self.transform)


@torch.no_grad()
def as_causal_lm(model: PreTrainedModel) -> CausalLM:
    """Wrap a transformers model: find its backbone, its logit transform and its number of positions.

    Runs the model on a few tokens to verify the result, because a family's name does not tell.

    Args:
        model: a model with weights, in training or evaluation mode; the mode is kept.

    Raises:
        NekoLeanError: the logits are not a LogitTransform of the last hidden states, or attention is not causal.
    """
    linear_head(model)
    reset_output_switches(model)
    was_training = model.training
    model.eval()
    try:
        backbone = find_backbone(model)
        scale, softcap = detect_logit_transform(model, backbone)
        lm = CausalLM(model, backbone, scale, softcap, embeddable_positions(model, model.config))

        input_ids = torch.arange(4, device=lm.device)[None] % len(lm.head)  # [1, 4]
        expected = model(input_ids=input_ids, use_cache=False).logits[0].float()  # [4, V]
        actual = lm.logits(lm.hidden(input_ids)[0])  # [4, V]
        refuse_non_causal(model, lm.hidden)
    finally:
        model.train(was_training)

    # If the model's own logits are NaN or infinite, later checks report the example that caused them.
    error = (expected - actual).abs().max()
    if expected.isfinite().all() and not error <= logit_tolerance(lm.head.dtype) * (1 + expected.abs().max()):
        raise NekoLeanError(
            f"{type(model).__name__} is not supported: its logits cannot be computed from its last hidden states and "
            f"its output embedding; use a model with a linear head."
        )
    return lm


def logit_tolerance(dtype: torch.dtype) -> float:
    """Largest relative difference between two ways to compute a model's outputs that rounding explains."""
    return 0.02 if dtype == torch.bfloat16 else 1e-4


def position_limit(lm: CausalLM, max_length: int) -> int:
    """`max_length`, or the number of positions of the model if that is smaller; in tokens."""
    return min(max_length, lm.max_positions or max_length)


def checkpoint_activations(model: nn.Module) -> list[nn.Module]:
    """Keep only each layer's input for the backward pass and recompute the other activations there.

    transformers' `gradient_checkpointing_enable` has no effect in evaluation mode, and training mode enables dropout;
    this function works in both modes.

    Returns:
        The layers whose forward was wrapped.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[nn.Module] = []
    nested: set[nn.Module] = set()  # modules of the layers that are wrapped already
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in nested:
            nested.update(module.modules())
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
            layers.append(module)
    return layers

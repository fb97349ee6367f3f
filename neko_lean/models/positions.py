"""Positions and causality: how long a sequence a model can embed, and whether tokens see what follows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from neko_lean.errors import NekoLeanError
from neko_lean.models.families import linear_head

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Tokens of the sequence on which causality is probed.
PROBE_LENGTH = 12

# Chunked attention with longer chunks is not probed beyond one chunk, because that would take long.
MAX_PROBED_CHUNK = 256

# Config keys for the number of positions, used by families whose attribute_map does not map theirs to the first.
POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len", "n_ctx")


@dataclass(frozen=True)
class CausalityProbe:
    """A sequence, the hidden states that it gives alone, and what is needed to vary it."""

    hidden_of: Callable[[Tensor], Tensor]  # from ids [1, L] to hidden states [1, L, d]
    input_ids: Tensor  # [1, L]
    hidden: Tensor  # [L, d] float32
    tokens: list[int]  # ordinary token ids, neither 0 nor padding
    tolerance: float  # largest difference that rounding explains

    def changes(self, other_ids: Tensor, length: int) -> bool:
        """Whether the first `length` hidden states differ for `other_ids` [1, L']."""
        other_hidden = self.hidden_of(other_ids)[0, :length].float()
        return bool((other_hidden - self.hidden[:length]).abs().max() > self.tolerance)

    def with_other_end(self, start: int) -> Tensor:
        """The sequence with other tokens from `start` on."""
        other_ids, length = self.input_ids.clone(), self.input_ids.shape[1]
        other_ids[0, start:] = torch.tensor(
            [self.tokens[(5 * n + 1) % len(self.tokens)] for n in range(length - start)]
        )
        return other_ids

    def padded(self, count: int, token: int) -> Tensor:
        """The sequence followed by `count` padding tokens."""
        return torch.cat([self.input_ids, self.input_ids.new_full((1, count), token)], dim=1)


def refuse_non_causal(model: PreTrainedModel, hidden_of: Callable[[Tensor], Tensor]) -> None:
    """Check that hidden states depend neither on later tokens nor on padding to their right.

    Sequences are padded on the right and run without an attention mask, which is exact only for causal attention. A
    violation must show in every trial: non-causal attention shows wherever later tokens change, while in bfloat16 a
    router that is undecided between two experts can flip in one trial but not in all.

    Args:
        model: the model, for its config and head.
        hidden_of: function from ids [1, L] to hidden states [1, L, d].

    Raises:
        NekoLeanError: hidden states depend on later tokens or on padding.
    """
    config, family = model.config.get_text_config(), type(model).__name__
    vocab_size = len(linear_head(model).weight)
    special_ids = (config.pad_token_id, config.eos_token_id)
    padding = next((i for i in special_ids if isinstance(i, int) and 0 <= i < vocab_size), 0)

    # The sequence is longer than a chunk of chunked attention, if the model has positions for that.
    positions = stated_positions(config) or 4 * MAX_PROBED_CHUNK
    chunk = _attention_chunk(config)
    if PROBE_LENGTH + 3 * chunk > positions:
        chunk = 0
    length = min(PROBE_LENGTH + chunk, positions - 2)
    if length < 2:
        return
    probe = _causality_probe(model, hidden_of, padding, length)

    starts = sorted({max(1, length // 3), max(1, length // 2), length - 1})
    if all(probe.changes(probe.with_other_end(start), start) for start in starts):
        is_encoder = getattr(config, "is_decoder", None) is False
        fix = "set is_decoder to true in config.json" if is_encoder else "use a causal language model"
        raise NekoLeanError(
            f"{family} is not supported as configured: its attention is not causal, the hidden state of a token "
            f"depends on later tokens; {fix}."
        )
    for token in {padding, 0}:
        for unit in {1, max(chunk, 1)}:
            if all(probe.changes(probe.padded(count * unit, token), length) for count in (1, 2)):
                raise NekoLeanError(
                    f"{family} is not supported: its hidden states depend on the padding to the right of a row; use "
                    f"another model."
                )


def _causality_probe(
    model: PreTrainedModel, hidden_of: Callable[[Tensor], Tensor], padding: int, length: int
) -> CausalityProbe:
    weight = linear_head(model).weight
    tokens = [token for token in range(len(weight)) if token not in (0, padding)] or [0]
    input_ids = torch.tensor([[tokens[(7 * n + 3) % len(tokens)] for n in range(length)]], device=weight.device)
    hidden = hidden_of(input_ids)[0].float()  # [L, d]

    relative = 2e-2 if weight.dtype in (torch.bfloat16, torch.float16) else 1e-4
    tolerance = relative * (1 + float(hidden.abs().max()))
    return CausalityProbe(hidden_of, input_ids, hidden, tokens, tolerance)


def _attention_chunk(config: PreTrainedConfig) -> int:
    """The longest chunk of chunked attention in config.json, in tokens, up to MAX_PROBED_CHUNK; 0 if there is none."""
    chunks = [value for name, value in vars(config).items() if "chunk" in name and isinstance(value, int)]
    return max((chunk for chunk in chunks if 1 < chunk <= MAX_PROBED_CHUNK), default=0)


def stated_positions(config: PreTrainedConfig) -> int | None:
    """The number of positions that config.json states; None if it states none."""
    text_config = config.get_text_config()
    values = [getattr(text_config, key, None) for key in POSITION_KEYS]
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def rescaling_length(config: PreTrainedConfig) -> int | None:
    """The length in tokens beyond which rotary embeddings depend on the longest sequence of a batch.

    Dynamic and LongRoPE scaling do this: the numbers of a sequence would then depend on its neighbours in the batch.
    None for other models.
    """
    text_config = config.get_text_config()
    parameters = getattr(text_config, "rope_parameters", None) or {}
    limits: list[int | None] = []
    for rope in (parameters, *parameters.values()):  # of the model, or one for each type of layer
        if isinstance(rope, dict) and rope.get("rope_type") in ("dynamic", "longrope"):
            limits.append(rope.get("original_max_position_embeddings"))
            limits.append(getattr(text_config, "original_max_position_embeddings", None))
            limits.append(getattr(text_config, "max_position_embeddings", None))
    return min((limit for limit in limits if limit), default=None)


def embeddable_positions(model: nn.Module, config: PreTrainedConfig) -> int | None:
    """The length in tokens of the longest sequence that a model can embed; None if nothing limits it.

    The limit is a table of positions (learned, sinusoidal or rotary) with one row for each position in config.json, up
    to the offset of 2 that OPT and BART have; or `rescaling_length`. Rotary embeddings that are computed on the fly set
    no limit.

    Args:
        model: the model, which may be on the meta device.
        config: its config.
    """
    limits = (_positions_in_tables(model, config), rescaling_length(config))
    return min((limit for limit in limits if limit is not None), default=None)


def _positions_in_tables(model: nn.Module, config: PreTrainedConfig) -> int | None:
    """`stated_positions`, if the model has a table of that many positions."""
    stated = stated_positions(config)
    if stated is None:
        return None
    sizes = range(stated, stated + 3)
    embedding = cast("PreTrainedModel", model).get_input_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not embedding and module.num_embeddings in sizes:
            return stated

        learned = (parameter for name, parameter in module.named_parameters(recurse=False) if "pos" in name)
        attributes = (value for value in vars(module).values() if isinstance(value, Tensor))
        tables = [*module.buffers(recurse=False), *learned, *attributes]
        if any(table.ndim in (2, 4) and {table.shape[0], table.shape[-2]} & set(sizes) for table in tables):
            return stated
    return None

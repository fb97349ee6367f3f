"""How many positions a model can embed, and whether its attention is causal."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from neko_lean.errors import NekoLeanError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
from neko_lean.models.families import linear_head

PROBE_LENGTH = 12


LONGEST_CHUNK = 256  # of tokens that a layer reads at once: longer ones are not probed, as that would take long


# What config.json calls the number of positions, where attribute_map does not map it to the first.
POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len", "n_ctx")


def refuse_sight_of_later_tokens(model: PreTrainedModel, hidden_of: Callable[[Tensor], Tensor]) -> None:
    """Raise NekoLeanError where a token's hidden state changes with the tokens or the padding behind it.

    Rows are padded on the right and no mask is given, which is exact only if attention is causal. `hidden_of` takes ids
    [1, L] to hidden states [1, L, d]. A sight of later tokens shows wherever they change; a router on the edge between
    two experts can flip anywhere in bfloat16, but not in each of the trials.
    """
    config, family = model.config.get_text_config(), type(model).__name__
    vocabulary, device = len(linear_head(model).weight), linear_head(model).weight.device
    ids = (config.pad_token_id, config.eos_token_id)
    padding = next((i for i in ids if isinstance(i, int) and 0 <= i < vocabulary), 0)
    positions = stated_positions(config) or 4 * LONGEST_CHUNK
    chunk = _chunk_length(config)
    if PROBE_LENGTH + 3 * chunk > positions:
        chunk = 0
    length = min(PROBE_LENGTH + chunk, positions - 2)
    if length < 2:
        return
    ordinary = [i for i in range(vocabulary) if i not in (0, padding)] or [0]
    row = torch.tensor([[ordinary[(7 * n + 3) % len(ordinary)] for n in range(length)]], device=device)  # [1, L]
    alone = hidden_of(row)[0].float()  # [L, d]
    tolerance = (2e-2 if linear_head(model).weight.dtype in (torch.bfloat16, torch.float16) else 1e-4) * (
        1 + float(alone.abs().max())
    )

    def changes(other: Tensor, first: int) -> bool:
        """Whether the first so many hidden states are others in the row `other` [1, L']."""
        return bool((hidden_of(other)[0, :first].float() - alone[:first]).abs().max() > tolerance)

    def with_other_end(start: int) -> Tensor:
        other = row.clone()
        other[0, start:] = torch.tensor([ordinary[(5 * n + 1) % len(ordinary)] for n in range(length - start)])
        return other

    def padded(count: int, token: int) -> Tensor:
        return torch.cat([row, row.new_full((1, count), token)], dim=1)

    not_a_decoder = getattr(config, "is_decoder", None) is False
    starts = sorted({max(1, length // 3), max(1, length // 2), length - 1})
    if all(changes(with_other_end(start), start) for start in starts):
        raise NekoLeanError(
            f"{family} is not supported as configured: its attention is not causal, a token's hidden state changes "
            f"with later tokens{'; set is_decoder to true in config.json' if not_a_decoder else ''}."
        )
    for token in {padding, 0}:
        if any(all(changes(padded(count * unit, token), length) for count in (1, 2)) for unit in {1, max(chunk, 1)}):
            raise NekoLeanError(f"{family} is not supported: its hidden states change with the padding behind a row.")


def _chunk_length(config: PreTrainedConfig) -> int:
    """The longest chunk of tokens that layers of the model read at once, by config.json; 0 where it names none."""
    found = [value for name, value in vars(config).items() if "chunk" in name and isinstance(value, int)]
    return max((value for value in found if 1 < value <= LONGEST_CHUNK), default=0)


def stated_positions(config: PreTrainedConfig) -> int | None:
    """How many positions config.json says that the model was made for; None where it does not say."""
    text = config.get_text_config()
    values = [getattr(text, name, None) for name in POSITIONS]
    found = [value for value in values if isinstance(value, int) and value > 0]
    return found[0] if found else None


def rescaling_length(config: PreTrainedConfig) -> int | None:
    """The length beyond which rotary embeddings depend on the longest row of a batch (dynamic and LongRoPE scaling), so
    that a row's numbers would depend on its neighbours; None for other models."""
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    limits: list[int | None] = []
    for rope in (parameters, *parameters.values()):  # of the model, or of each type of layer
        if isinstance(rope, dict) and rope.get("rope_type") in ("dynamic", "longrope"):
            limits.append(rope.get("original_max_position_embeddings"))
            limits.append(getattr(text, "original_max_position_embeddings", None))
            limits.append(getattr(text, "max_position_embeddings", None))
    return min((limit for limit in limits if limit), default=None)


def embeddable_positions(model: nn.Module, config: PreTrainedConfig) -> int | None:
    """The longest row that the model can embed by itself; None where nothing sets a limit.

    A limit is a table (learned, sinusoidal or rotary) with a row for each of config.json's positions, give or take the
    offset of 2 that OPT and BART have; or `rescaling_length`. Other rotary embeddings that are computed as needed set
    none. A model on the meta device is enough.
    """
    limits = (_positions_in_tables(model, config), rescaling_length(config))
    return min((limit for limit in limits if limit is not None), default=None)


def _positions_in_tables(model: nn.Module, config: PreTrainedConfig) -> int | None:
    stated = stated_positions(config)
    if stated is None:
        return None
    sizes = range(stated, stated + 3)
    embedding = cast("PreTrainedModel", model).get_input_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not embedding and module.num_embeddings in sizes:
            return stated
        learned = (p for name, p in module.named_parameters(recurse=False) if "pos" in name)
        kept = (value for value in vars(module).values() if isinstance(value, Tensor))
        tables = [*module.buffers(recurse=False), *learned, *kept]
        if any(table.ndim in (2, 4) and {table.shape[0], table.shape[-2]} & set(sizes) for table in tables):
            return stated
    return None

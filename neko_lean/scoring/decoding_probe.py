"""Is a faster way of decoding, or a shared prefix, exact for this model? Tried once per loaded model, on random tokens.

A probe feeds the same tokens in the way on trial and compares the logits of every step with those of plain forward
passes over each row alone. A way that raises, or that deviates by more than rounding does in this model, is not used.
Rounding is measured, not assumed: how far do the logits move when every input embedding moves by one unit in the last
place? Over 130 families in float32 the exact ways deviate by at most 3 times that, the wrong ones by more than 200
times; in bfloat16 the exact ones by at most 0.7 times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from neko_lean.models import CausalLM, position_limit, rescaling_length
from neko_lean.scoring.decoding import Choose, Decode, Prompts, decode_cached, decode_full, decode_padded

PROBE_LENGTH = 64  # positions of the longest padded row


LONG_PROBE_LENGTH = 320  # of a row decoded with a recurrent state: past the chunks in which such layers read a prompt


STEPS = 6


# Deviation allowed: as a multiple of the rounding measured, and at most, where rounding alone upsets a model.
TOLERANCE = 4.0


LARGEST_DEVIATION = 0.1


# Layers whose cache is keys and values and nothing else, or that keep none.
KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)


_outcomes: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Method:
    """One way to decode a batch.

    Attributes:
        name: what to call it in a message.
        decode: the loop.
        grouping: which rows it takes together: "any" rows, those of "one length", or each "alone".
    """

    name: str
    decode: Decode
    grouping: str


PADDED = Method("in padded batches", decode_padded, "any")


CACHED = Method("by transformers' generate, prompts of equal length together", decode_cached, "one length")


CACHED_ALONE = Method("by transformers' generate, one prompt at a time", decode_cached, "alone")


FULL = Method("without a cache, each token by a forward pass over its whole row", decode_full, "one length")


def decode_exactly(lm: CausalLM, prompts: Prompts, choose: Choose) -> None:
    """Decode one batch in the fastest way that is exact for this model."""
    lengths = [len(ids) for ids in prompts.ids]
    method = pick_method(lm, prompts.pad_id, max(lengths) + prompts.max_new_tokens)

    for group in _groups(lengths, method.grouping):

        def choose_in_batch(places: Sequence[int], scores: Tensor, group: list[int] = group) -> Sequence[int | None]:
            return choose([group[place] for place in places], scores)

        own = Prompts([prompts.ids[row] for row in group], prompts.pad_id, prompts.max_new_tokens)
        method.decode(lm, own, choose_in_batch)


def _groups(lengths: Sequence[int], grouping: str) -> list[list[int]]:
    """Rows that are decoded together, of a batch whose prompts have these lengths."""
    rows = list(range(len(lengths)))
    if grouping == "any":
        return [rows]
    if grouping == "alone":
        return [[row] for row in rows]
    return [[row for row in rows if lengths[row] == length] for length in sorted(set(lengths))]


def pick_method(lm: CausalLM, pad_id: int, length: int) -> Method:
    """The fastest way to decode that is exact for this model, for rows of up to `length` tokens in the end."""
    if length <= batch_length_limit(lm) and probed(lm, "padded", lambda: _pads_exactly(lm, pad_id)):
        return PADDED
    if probed(lm, "cached", lambda: _caches_exactly(lm, pad_id, 3)):
        return CACHED
    if probed(lm, "cached alone", lambda: _caches_exactly(lm, pad_id, 1)):
        return CACHED_ALONE
    return FULL


def probed(lm: CausalLM, name: str, probe: Callable[[], bool]) -> bool:
    """The outcome of a probe, which runs when it is first asked for; one that raises says no."""
    outcomes = _outcomes.setdefault(lm.model, {})
    if name not in outcomes:
        was_training = lm.model.training
        lm.model.eval()
        try:
            outcomes[name] = probe()
        except torch.OutOfMemoryError:
            raise
        except Exception:  # families raise whatever they like for arguments that they do not know
            outcomes[name] = False
        finally:
            lm.model.train(was_training)
    return outcomes[name]


def keeps_only_keys_and_values(lm: CausalLM) -> bool:
    """Whether all that the model keeps of past tokens is attention keys and values.

    Recurrent states are told by their kind and not only by a probe: in a trained model, what padding leaves in a state
    can be as small as the rounding of bfloat16.
    """
    cache = DynamicCache(config=lm.model.config)
    return not lm.model._is_stateful and all(type(layer) in KEYS_AND_VALUES for layer in cache.layers)


def batch_length_limit(lm: CausalLM) -> float:
    """Up to what length rows of different lengths may share a batch, whatever a probe of short rows says.

    Rotary embeddings that stretch with the longest row of a batch, and attention in chunks counted from a batch's first
    place, treat a row as its neighbours are beyond this length.
    """
    chunk = getattr(lm.model.config.get_text_config(decoder=True), "attention_chunk_size", None)
    return min((limit for limit in (chunk, rescaling_length(lm.model.config)) if limit), default=float("inf"))


def _pads_exactly(lm: CausalLM, pad_id: int) -> bool:
    """Whether `decode_padded` is exact."""
    longest = int(min(position_limit(lm, PROBE_LENGTH), batch_length_limit(lm))) - STEPS
    if longest < 4 or not keeps_only_keys_and_values(lm):
        return False

    steps = (2, 4, STEPS, STEPS)  # the longest row leaves first: the others have to do without it
    prompts, forced = random_rows(lm, (longest, 1, longest // 3, longest // 2), pad_id)
    found = _decode_forced(decode_padded, lm, prompts, forced, steps, pad_id)

    # The tokens in the padding may change nothing, to the last bit. Experts see them, in batches of other sizes.
    other_pad = next(token for ids in prompts for token in ids if token != pad_id)
    others = _decode_forced(decode_padded, lm, prompts, forced, steps, other_pad)
    unseen = all(torch.equal(logits, other) for logits, other in zip(found, others, strict=True))
    return (unseen or _has_experts(lm)) and _as_plain(lm, prompts, forced, steps, found)


def _caches_exactly(lm: CausalLM, pad_id: int, batch_size: int) -> bool:
    """Whether `decode_cached` is exact for so many prompts of one length."""
    limit = position_limit(lm, LONG_PROBE_LENGTH) - STEPS
    trials = ((min(limit, 20),) * batch_size, (limit,), (1,))
    for lengths in trials:
        steps = (2, STEPS, STEPS)[-len(lengths) :]  # in a batch the first row ends before the others
        prompts, forced = random_rows(lm, lengths, pad_id)
        found = _decode_forced(decode_cached, lm, prompts, forced, steps, pad_id)
        if not _as_plain(lm, prompts, forced, steps, found):
            return False
    return True


def random_rows(lm: CausalLM, lengths: Sequence[int], pad_id: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of these lengths, and STEPS tokens for each to go on with; none of them a special token."""
    special = {pad_id, *(getattr(lm.model.config, f"{name}_token_id", None) for name in ("pad", "bos", "eos"))}
    ordinary = [token for token in range(min(len(lm.head), len(lm.embedding))) if token not in special]
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return [ordinary[place] for place in torch.randint(len(ordinary), (count,), generator=generator).tolist()]

    return [draw(length) for length in lengths], [draw(STEPS) for _ in lengths]


def _decode_forced(
    decode: Decode,
    lm: CausalLM,
    prompts: Sequence[list[int]],
    forced: Sequence[list[int]],
    steps: Sequence[int],
    pad_id: int,
) -> list[Tensor]:
    """Logits [steps of the row, V] of each row when it is continued with the tokens `forced`."""
    found: list[list[Tensor]] = [[] for _ in prompts]

    def choose(rows: Sequence[int], scores: Tensor) -> list[int | None]:
        tokens: list[int | None] = []
        for row, own in zip(rows, scores, strict=True):
            step = len(found[row])
            tokens.append(forced[row][step] if step + 1 < steps[row] else None)
            found[row].append(own.float())
        return tokens

    decode(lm, Prompts(prompts, pad_id, STEPS), choose)
    return [torch.stack(own) for own in found]


def _as_plain(
    lm: CausalLM,
    prompts: Sequence[list[int]],
    forced: Sequence[list[int]],
    steps: Sequence[int],
    found: Sequence[Tensor],
) -> bool:
    if [len(own) for own in found] != list(steps):
        return False
    rows = [[*ids, *tokens[: count - 1]] for ids, tokens, count in zip(prompts, forced, steps, strict=True)]
    return equals_plain(lm, rows, found)


@torch.no_grad()
def equals_plain(lm: CausalLM, rows: Sequence[list[int]], found: Sequence[Tensor]) -> bool:
    """Whether `found`, logits [n, V] after the last n tokens of each row, are those of plain forward passes over each
    row alone, up to rounding."""
    # In 16 bits a router may pick other experts for a token here and there, which is rounding too: not most tokens'.
    worst = torch.median if _has_experts(lm) and lm.head.dtype.itemsize < 4 else torch.max
    deviation, rounding = 0.0, 0.0

    for row, own in zip(rows, found, strict=True):
        plain = _plain_logits(lm, row, len(own))
        with _rounded_embeddings(lm):
            rounded = _plain_logits(lm, row, len(own))
        of_row = worst(_deviation(own, plain))
        if not of_row <= LARGEST_DEVIATION:  # NaN too
            return False
        deviation = max(deviation, float(of_row))
        rounding = max(rounding, float(worst(_deviation(rounded, plain))))

    return deviation <= TOLERANCE * rounding + torch.finfo(lm.head.dtype).eps


def _plain_logits(lm: CausalLM, row: list[int], count: int) -> Tensor:
    """Logits [count, V] after each of a row's last tokens."""
    hidden = lm.hidden(torch.tensor([row], device=lm.device))[0, -count:]
    return lm.logits(hidden).float()


def _deviation(found: Tensor, plain: Tensor) -> Tensor:
    """Relative distance of logits [n, V] from others, [n]; what all logits of a step share changes no probability."""
    found = found - found.mean(1, keepdim=True)
    plain = plain - plain.mean(1, keepdim=True)
    deviation: Tensor = (found - plain).norm(dim=1) / plain.norm(dim=1)
    return deviation


@contextmanager
def _rounded_embeddings(lm: CausalLM) -> Iterator[None]:
    """Move every input embedding by one unit in the last place, up or down."""
    generator = torch.Generator().manual_seed(0)

    def move(module: nn.Module, args: tuple[object, ...], embedded: Tensor) -> Tensor:
        signs = torch.randint(2, embedded.shape, generator=generator).to(embedded) * 2 - 1
        return embedded * (1 + torch.finfo(embedded.dtype).eps * signs)

    hook = lm.model.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        hook.remove()


def _has_experts(lm: CausalLM) -> bool:
    return any("expert" in name for name, _ in lm.model.named_modules())

"""Tests whether a fast decoding method, or a shared prefix, is exact for a model, once per loaded model.

A probe decodes random tokens and compares the logits of every step with those of plain forward passes over each row
alone. A method that raises, or deviates by more than rounding, is not used. The model's rounding is measured: it is the
change of the logits when every input embedding changes by one unit in the last place. Over 130 model families, exact
methods deviate by at most 3 times that in float32 (0.7 times in bfloat16), and wrong ones by more than 200 times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import cache_utils
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from neko_lean.models import CausalLM, position_limit, rescaling_length
from neko_lean.scoring.decoding import Choose, Decode, Prompts, decode_cached, decode_full, decode_padded

PROBE_LENGTH = 64  # positions of the longest row in a padded batch
LONG_PROBE_LENGTH = 320  # positions with a recurrent state: more than the chunks in which such layers read a prompt
STEPS = 6  # tokens decoded by a probe
# Maximum deviation: as a multiple of the measured rounding, and as an absolute limit for models unstable to rounding.
TOLERANCE = 4.0
LARGEST_DEVIATION = 0.1
# Cache layers that hold keys and values and nothing else, or nothing at all. Older versions of transformers have no
# layers of the last kind.
KEYS_AND_VALUES = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    *([cache_utils.DummyLayer] if hasattr(cache_utils, "DummyLayer") else []),
)
_outcomes: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Method:
    """A decoding method.

    Attributes:
        name: its name in log lines.
        decode: the decoding loop.
        grouping: which rows it decodes together: "any", those of "one length", or each "alone".
    """

    name: str
    decode: Decode
    grouping: str


PADDED = Method("in padded batches", decode_padded, "any")
CACHED = Method("by transformers' generate, prompts of equal length together", decode_cached, "one length")
CACHED_ALONE = Method("by transformers' generate, one prompt at a time", decode_cached, "alone")
FULL = Method("without a cache, with a forward pass over the whole row for each token", decode_full, "one length")


def decode_exactly(lm: CausalLM, prompts: Prompts, choose: Choose) -> None:
    """Decode one batch with the fastest method that is exact for this model."""
    lengths = [len(ids) for ids in prompts.ids]
    method = pick_method(lm, prompts.pad_id, max(lengths) + prompts.max_new_tokens)

    for group in _groups(lengths, method.grouping):

        def choose_in_group(indices: Sequence[int], scores: Tensor, group: list[int] = group) -> Sequence[int | None]:
            return choose([group[index] for index in indices], scores)

        batch = Prompts([prompts.ids[row] for row in group], prompts.pad_id, prompts.max_new_tokens)
        method.decode(lm, batch, choose_in_group)


def _groups(lengths: Sequence[int], grouping: str) -> list[list[int]]:
    """Divide the rows of a batch, given the lengths of their prompts, into groups that are decoded together."""
    rows = list(range(len(lengths)))
    if grouping == "any":
        return [rows]
    if grouping == "alone":
        return [[row] for row in rows]
    return [[row for row in rows if lengths[row] == length] for length in sorted(set(lengths))]


def pick_method(lm: CausalLM, pad_id: int, length: int) -> Method:
    """The fastest method that is exact for this model and rows of up to `length` tokens, new tokens included."""
    if length <= batch_length_limit(lm) and probed(lm, "padded", lambda: _pads_exactly(lm, pad_id)):
        return PADDED
    if probed(lm, "cached", lambda: _caches_exactly(lm, pad_id, 3)):
        return CACHED
    if probed(lm, "cached alone", lambda: _caches_exactly(lm, pad_id, 1)):
        return CACHED_ALONE
    return FULL


def probed(lm: CausalLM, name: str, probe: Callable[[], bool]) -> bool:
    """The outcome of a probe, which runs on the first call for this model; False if the probe raises."""
    outcomes = _outcomes.setdefault(lm.model, {})
    if name not in outcomes:
        was_training = lm.model.training
        lm.model.eval()
        try:
            outcomes[name] = probe()
        except torch.OutOfMemoryError:
            raise
        except Exception:  # model families raise all kinds of errors for unsupported arguments
            outcomes[name] = False
        finally:
            lm.model.train(was_training)
    return outcomes[name]


def keeps_only_keys_and_values(lm: CausalLM) -> bool:
    """Whether attention keys and values are all that the model keeps of past tokens.

    A probe alone would not detect every recurrent state: in a trained model, the effect of padding on the state can be
    as small as the rounding of bfloat16.
    """
    cache = DynamicCache(config=lm.model.config)
    return not lm.model._is_stateful and all(type(layer) in KEYS_AND_VALUES for layer in cache.layers)


def batch_length_limit(lm: CausalLM) -> float:
    """Maximum length up to which rows of different lengths may share a batch, whatever a probe of short rows finds.

    Beyond it, other rows of the batch affect a row: rotary embeddings may scale with the longest row of the batch, and
    chunked attention may count its chunks from the batch's first position.
    """
    chunk = getattr(lm.model.config.get_text_config(decoder=True), "attention_chunk_size", None)
    return min((limit for limit in (chunk, rescaling_length(lm.model.config)) if limit), default=float("inf"))


def _pads_exactly(lm: CausalLM, pad_id: int) -> bool:
    """Whether `decode_padded` is exact."""
    longest = int(min(position_limit(lm, PROBE_LENGTH), batch_length_limit(lm))) - STEPS
    if longest < 4 or not keeps_only_keys_and_values(lm):
        return False

    steps = (2, 4, STEPS, STEPS)  # the longest row ends first, and the others continue without it
    prompts, forced = random_rows(lm, (longest, 1, longest // 3, longest // 2), pad_id)
    decoded = _decode_forced(decode_padded, lm, prompts, forced, steps, pad_id)

    # The padding token must not change a single bit, except with experts, whose batch sizes depend on it.
    other_pad = next(token for ids in prompts for token in ids if token != pad_id)
    with_other_pad = _decode_forced(decode_padded, lm, prompts, forced, steps, other_pad)
    pad_is_ignored = all(torch.equal(logits, other) for logits, other in zip(decoded, with_other_pad, strict=True))
    return (pad_is_ignored or _has_experts(lm)) and _equals_plain(lm, prompts, forced, steps, decoded)


def _caches_exactly(lm: CausalLM, pad_id: int, batch_size: int) -> bool:
    """Whether `decode_cached` is exact for batches of `batch_size` prompts of equal length."""
    limit = position_limit(lm, LONG_PROBE_LENGTH) - STEPS
    trials = ((min(limit, 20),) * batch_size, (limit,), (1,))
    for lengths in trials:
        steps = (2, STEPS, STEPS)[-len(lengths) :]  # in a batch, the first row ends before the others
        prompts, forced = random_rows(lm, lengths, pad_id)
        decoded = _decode_forced(decode_cached, lm, prompts, forced, steps, pad_id)
        if not _equals_plain(lm, prompts, forced, steps, decoded):
            return False
    return True


def random_rows(lm: CausalLM, lengths: Sequence[int], pad_id: int) -> tuple[list[list[int]], list[list[int]]]:
    """Random prompts of these lengths, and STEPS tokens to continue each of them, without special tokens."""
    special = {pad_id, *(getattr(lm.model.config, f"{name}_token_id", None) for name in ("pad", "bos", "eos"))}
    ordinary = [token for token in range(min(len(lm.head), len(lm.embedding))) if token not in special]
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return [ordinary[index] for index in torch.randint(len(ordinary), (count,), generator=generator).tolist()]

    return [draw(length) for length in lengths], [draw(STEPS) for _ in lengths]


def _decode_forced(
    decode: Decode,
    lm: CausalLM,
    prompts: Sequence[list[int]],
    forced: Sequence[list[int]],
    steps: Sequence[int],
    pad_id: int,
) -> list[Tensor]:
    """Logits of each row when it is continued with the tokens in `forced`: [steps of the row, V]."""
    logits: list[list[Tensor]] = [[] for _ in prompts]

    def choose(rows: Sequence[int], scores: Tensor) -> list[int | None]:
        tokens: list[int | None] = []
        for row, row_scores in zip(rows, scores, strict=True):
            step = len(logits[row])
            tokens.append(forced[row][step] if step + 1 < steps[row] else None)
            logits[row].append(row_scores.float())
        return tokens

    decode(lm, Prompts(prompts, pad_id, STEPS), choose)
    return [torch.stack(of_row) for of_row in logits]


def _equals_plain(
    lm: CausalLM,
    prompts: Sequence[list[int]],
    forced: Sequence[list[int]],
    steps: Sequence[int],
    decoded: Sequence[Tensor],
) -> bool:
    """Whether the logits of `_decode_forced` are those of plain forward passes, see `equals_plain`."""
    if [len(logits) for logits in decoded] != list(steps):
        return False
    rows = [[*ids, *tokens[: count - 1]] for ids, tokens, count in zip(prompts, forced, steps, strict=True)]
    return equals_plain(lm, rows, decoded)


@torch.no_grad()
def equals_plain(lm: CausalLM, rows: Sequence[list[int]], decoded: Sequence[Tensor]) -> bool:
    """Whether logits equal those of plain forward passes over each row alone, up to rounding.

    Args:
        lm: the model.
        rows: token ids of each row.
        decoded: logits after the last N tokens of each row: [N, V].
    """
    # In 16 bits, rounding may change a router's choice of experts for a few tokens, but not for most of them.
    worst = torch.median if _has_experts(lm) and lm.head.dtype.itemsize < 4 else torch.max
    deviation, rounding = 0.0, 0.0

    for row, logits in zip(rows, decoded, strict=True):
        plain = _plain_logits(lm, row, len(logits))
        with _rounded_embeddings(lm):
            rounded = _plain_logits(lm, row, len(logits))
        of_row = worst(_deviation(logits, plain))
        if not of_row <= LARGEST_DEVIATION:  # NaN, too
            return False
        deviation = max(deviation, float(of_row))
        rounding = max(rounding, float(worst(_deviation(rounded, plain))))

    return deviation <= TOLERANCE * rounding + torch.finfo(lm.head.dtype).eps


def _plain_logits(lm: CausalLM, row: list[int], count: int) -> Tensor:
    """Logits after each of the last `count` tokens of a row: [count, V]."""
    hidden = lm.hidden(torch.tensor([row], device=lm.device))[0, -count:]
    return lm.logits(hidden).float()


def _deviation(logits: Tensor, plain: Tensor) -> Tensor:
    """Relative distance of logits from plain ones, [N, V] each, ignoring a constant added to a step's logits: [N]."""
    logits = logits - logits.mean(1, keepdim=True)
    plain = plain - plain.mean(1, keepdim=True)
    deviation: Tensor = (logits - plain).norm(dim=1) / plain.norm(dim=1)
    return deviation


@contextmanager
def _rounded_embeddings(lm: CausalLM) -> Iterator[None]:
    """Change every input embedding by one unit in the last place, up or down."""
    generator = torch.Generator().manual_seed(0)

    def perturb(module: nn.Module, args: tuple[object, ...], embedded: Tensor) -> Tensor:
        signs = torch.randint(2, embedded.shape, generator=generator).to(embedded) * 2 - 1
        return embedded * (1 + torch.finfo(embedded.dtype).eps * signs)

    hook = lm.model.get_input_embeddings().register_forward_hook(perturb)
    try:
        yield
    finally:
        hook.remove()


def _has_experts(lm: CausalLM) -> bool:
    return any("expert" in name for name, _ in lm.model.named_modules())

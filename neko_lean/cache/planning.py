"""Plan a cache before the teacher runs: which examples it contains, and which shard stores each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from neko_lean.cache.format import STORED_DTYPES, Shard, shard_name
from neko_lean.cache.shots import with_shots
from neko_lean.data import (
    EncodedExample,
    Example,
    PromptFormat,
    RowSource,
    check_format_name,
    encode,
    encode_anchor,
    length_batches,
    read_anchor,
    read_rows,
    refusals,
    refuse_unused_split,
    unseen_anchor,
    without_overlap,
)
from neko_lean.errors import NekoLeanError
from neko_lean.options import CacheOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ExampleBatch = list[EncodedExample]

SHARD_POSITIONS = 2**16  # positions in a shard before the next one begins: 17 MB at 64 entries per position


def validate_options(options: CacheOptions) -> None:
    """Raise NekoLeanError if an option has an impossible value."""
    for name in ("top_k", "max_length", "batch_tokens"):
        if getattr(options, name) < 1:
            raise NekoLeanError(f"{name} must be at least 1, got {getattr(options, name)}.")
    if not 0 < options.mass <= 1:
        raise NekoLeanError(f"mass must be > 0 and <= 1, got {options.mass}.")
    if options.stored_dtype not in STORED_DTYPES:
        raise NekoLeanError(f"stored_dtype {options.stored_dtype!r} is not one of {', '.join(STORED_DTYPES)}.")
    for name in ("self_generated", "shots"):
        if getattr(options, name) < 0:
            raise NekoLeanError(f"{name} must be at least 0, got {getattr(options, name)}.")
    check_format_name(options.format)


@dataclass(frozen=True)
class CacheData:
    """The data sets that a cache is made of."""

    retain: list[Example]
    anchor: list[Example]
    forget: list[Example]


def read_cache_data(
    retain: RowSource | None, forget: RowSource | None, anchor: RowSource | None, options: CacheOptions
) -> CacheData:
    """Read the data sets that `cache_teacher` is given.

    Raises NekoLeanError for bad data, for retain or anchor rows that are also in the forget set, and for anchor rows
    that are also in the retain set.
    """
    read = partial(read_rows, split=options.split, columns=options.columns)
    refuse_unused_split(options.split, retain, forget)
    data = CacheData(
        retain=read(retain, "retain") if retain is not None else [],
        anchor=read_anchor(anchor, options.columns) if anchor is not None else [],
        forget=read(forget, "forget") if forget is not None else [],
    )
    if options.drop_overlap and forget is None and anchor is None:
        raise NekoLeanError(
            "--drop-overlap has no effect without --forget or --anchor; pass one of them, or leave it out."
        )
    drop = options.drop_overlap
    return replace(
        data,
        retain=without_overlap(data.forget, data.retain, "retain", drop),
        anchor=unseen_anchor(data.anchor, data.forget, data.retain, drop),
    )


@dataclass(frozen=True)
class CacheExamples:
    """The tokenized examples of a cache, each at most once per list.

    Attributes:
        top_k: examples whose top-k probabilities are stored, in retain shards.
        targets: examples whose tokens' log-probabilities are stored, in forget shards.
    """

    top_k: list[EncodedExample]
    targets: list[EncodedExample]

    @property
    def all(self) -> list[EncodedExample]:
        return [*self.top_k, *self.targets]


def encode_cache_data(
    data: CacheData,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptFormat,
    max_length: int,
    shots: int = 0,
    max_positions: int = 0,
) -> CacheExamples:
    """Tokenize the data sets, and each forget example with a refusal as its answer.

    Args:
        data: the data sets.
        tokenizer: the teacher's tokenizer.
        prompts: prompt format, which does not apply to the anchor's documents.
        max_length: number of tokens that examples are truncated to; longer documents are split into windows.
        shots: retain examples that the teacher reads before each question to forget or of the anchor, see `with_shots`.
        max_positions: positions of the teacher, which limit the shots.
    """
    retain = encode(data.retain, tokenizer, prompts, max_length, windows=True)
    anchor = encode_anchor(data.anchor, tokenizer, prompts, max_length)
    forget = encode(data.forget, tokenizer, prompts, max_length, windows=True)
    prompted = [example for example in data.forget if example.kind != "document"]
    refused = encode(refusals(prompted), tokenizer, prompts, max_length)
    if shots:
        questions = [*forget, *refused, *anchor]
        read = iter(with_shots(questions, retain, shots, tokenizer, max_positions))
        forget, refused, anchor = ([next(read) for _ in examples] for examples in (forget, refused, anchor))
    return CacheExamples(top_k=_distinct(retain + anchor + forget), targets=_distinct(forget + refused + anchor))


def _distinct(examples: Sequence[EncodedExample]) -> list[EncodedExample]:
    """Remove examples that have both id and text in common with another one."""
    return list({(example.example.id, example.example.digest): example for example in examples}.values())


@dataclass(frozen=True)
class ShardJob:
    """A shard to write, and the batches of examples that the teacher runs on for it."""

    shard: Shard
    batches: list[ExampleBatch]

    @property
    def num_tokens(self) -> int:
        return sum(len(example) for batch in self.batches for example in batch)


@dataclass(frozen=True)
class ShardJobs:
    """The shards of a cache: `top_k` are its retain shards and `targets` its forget shards."""

    top_k: list[ShardJob]
    targets: list[ShardJob]


def plan_shards(examples: CacheExamples, batch_tokens: int) -> ShardJobs:
    """Distribute the examples over shards. The result depends only on the arguments."""
    return ShardJobs(
        top_k=_plan_shards("shard", examples.top_k, batch_tokens, skipped_tokens=0),
        # The first token of an example has no log-probability.
        targets=_plan_shards("forget", examples.targets, batch_tokens, skipped_tokens=1),
    )


def _plan_shards(
    kind: str, examples: Sequence[EncodedExample], batch_tokens: int, skipped_tokens: int
) -> list[ShardJob]:
    groups = _group_batches(teacher_batches(examples, batch_tokens))
    jobs = []
    for number, batches in enumerate(groups):
        rows = [
            (example.example.id, len(example) - skipped_tokens, example.example.digest)
            for batch in batches
            for example in batch
        ]
        name = shard_name(kind, number, len(groups))
        jobs.append(ShardJob(Shard(name, bytes=0, sha256="", rows=rows), batches))
    return jobs


def teacher_batches(examples: Sequence[EncodedExample], batch_tokens: int) -> list[ExampleBatch]:
    """Batches of examples of similar length, shortest first; the same on every run.

    Args:
        examples: tokenized examples.
        batch_tokens: maximum number of positions in a batch, padding and shots included.
    """
    lengths = [len(example.ids_with_shots) for example in examples]
    batches = length_batches(lengths, max_rows=max(1, len(examples)), max_tokens=batch_tokens)
    return [[examples[index] for index in batch] for batch in batches]


def _group_batches(batches: Sequence[ExampleBatch]) -> list[list[ExampleBatch]]:
    """Group consecutive batches until each group has at least SHARD_POSITIONS positions."""
    groups: list[list[ExampleBatch]] = []
    positions = 0
    for batch in batches:
        if not groups or positions >= SHARD_POSITIONS:
            groups.append([])
            positions = 0
        groups[-1].append(batch)
        positions += sum(map(len, batch))
    return groups

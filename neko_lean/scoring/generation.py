"""Generation in batches, greedy or by sampling, independent of the generation config that a checkpoint comes with.

Generation of an answer stops early once no further token could change any of its scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from neko_lean.data import Example, encode_prompts, encode_texts
from neko_lean.data.scripts import bare
from neko_lean.distributed import items_of_rank, raise_on_any_rank
from neko_lean.errors import NekoLeanError
from neko_lean.models import CausalLM, eos_token_ids, greedy_tokens, refuse_unknown_ids, unknown_eos_token_ids
from neko_lean.scoring.decoding import Prompts
from neko_lean.scoring.decoding_probe import PADDED, decode_exactly, pick_method
from neko_lean.scoring.limits import MAX_LENGTH, TruncationCounts, fit_prompt, generation_batches
from neko_lean.scoring.sampling import random_stream, sampled_tokens
from neko_lean.scoring.task import equivalent_answers, regurgitation, score_name, unicode_regurgitation
from neko_lean.terminal import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Leaks and degenerate outputs are measured on a generation's first WINDOW tokens, or on twice the length of the answer
# if that is longer.
WINDOW = 64
STRIDE = 16  # tokens between two checks whether an answer is settled
# Takes the indices of the rows still decoding and their logits [N, V]; returns each row's next token.
Pick = Callable[[Sequence[int], Tensor], Sequence[int]]


@dataclass(frozen=True)
class GenerationLimits:
    """Where batches and generations end.

    Attributes:
        batch_size: maximum number of prompts per batch.
        max_new_tokens: maximum number of new tokens per prompt.
        stop_early: stop a generation once its scores are settled.
        stop_texts: the answer to a question ends before the first of these texts, which a model writes when it goes on
            to the next question of a prompt with in-context examples.
    """

    batch_size: int
    max_new_tokens: int
    stop_early: bool = True
    stop_texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Generation:
    """A generated answer.

    Attributes:
        text: the whole generation.
        window: the text of its first tokens, see WINDOW.
        ended: why it ended: "eos", "limit", or "settled" if further tokens could not change its scores.
    """

    text: str
    window: str
    ended: str


def is_settled(example: Example, text: str) -> bool:
    """Whether both scores of the example, official and Unicode, stay the same however `text` continues.

    Cleaning up tokenization spaces can later join words, so only the part that it cannot change counts: for knowledge,
    everything but the spaces; for regurgitation, everything but the last two words.
    """
    if score_name(example) == "knowledge":
        # An answer such as None is read back as nan, so the text NULL may still become correct.
        beginning = bare(text.rstrip("\ufffd"))
        return not any(bare(answer).startswith(beginning) for answer in equivalent_answers(example.output))
    complete = " ".join(text.split()[:-2])
    return regurgitation(example.output, complete) == 1.0 == unicode_regurgitation(example.output, complete)


def to_generation(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], window: int, ended: str, stop_texts: Sequence[str] = ()
) -> Generation:
    """Decode generated tokens, without special tokens, with tokenization spaces cleaned up, and up to a stop text."""

    def decode(tokens: Sequence[int]) -> str:
        # Called explicitly: transformers 5 ignores the option of `decode` for BPE, and the shared task had it set.
        text = tokenizer.clean_up_tokenization(cast(str, tokenizer.decode(list(tokens), skip_special_tokens=True)))
        return cut_at_stop_text(text, stop_texts)

    return Generation(decode(ids), decode(ids[:window]), ended)


def cut_at_stop_text(text: str, stop_texts: Sequence[str]) -> str:
    """The text before the first of these texts.

    Example:
        >>> cut_at_stop_text("Here.\\nQuestion: Who?", ("\\n\\n", "\\nQuestion"))
        'Here.'
    """
    for stop in stop_texts:
        text = text.split(stop)[0]
    return text


def examples_of_rank(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    limits: GenerationLimits,
    prompts: Sequence[Sequence[int]] | None = None,
) -> list[int]:
    """Indices of the examples that this rank generates.

    A rank gets whole batches. `generate` then forms the same batches from them that a single process would form, so the
    generated texts are the same in any dtype.
    """
    prompts = encode_prompts(examples, tokenizer, "plain") if prompts is None else prompts
    fits = [fit_prompt(lm, ids, limits.max_new_tokens) for ids in prompts]
    batches = _batches(examples, prompts, fits, limits.batch_size)
    return sorted(i for batch in items_of_rank(batches) for i in batch)


def _batches(
    examples: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    fits: Sequence[tuple[Sequence[int], int]],
    batch_size: int,
) -> list[list[int]]:
    """Indices of the examples in batches: knowledge and regurgitation apart, prompts of similar length together."""
    lengths, shapes = [len(ids) for ids in prompts], [(len(fitted), new_tokens) for fitted, new_tokens in fits]
    names = [score_name(example) for example in examples]
    by_name = ([i for i, name in enumerate(names) if name == wanted] for wanted in ("knowledge", "regurgitation"))
    return [batch for order in by_name for batch in generation_batches(lengths, shapes, order, batch_size)]


def refuse_empty_prompts(examples: Sequence[Example], prompts: Sequence[Sequence[int]]) -> None:
    """Raise NekoLeanError naming the first example whose prompt has no tokens to continue."""
    empty = next((example for example, ids in zip(examples, prompts, strict=True) if not ids), None)
    if empty is not None:
        raise NekoLeanError(f"row {empty.id}: the input has no tokens in this tokenizer; give a non-empty input.")


def generation_warnings(
    lm: CausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    truncated: TruncationCounts | None = None,
) -> list[str]:
    """Warnings about what silently changes the generations of these prompts; `truncated` receives the counts."""
    truncated = TruncationCounts() if truncated is None else truncated
    warnings = []
    unknown = unknown_eos_token_ids(lm)
    if unknown:
        named = ", ".join(map(repr, unknown[:5]))
        warnings.append(
            f"warning: generations do not end at {named}: the eos_token_id of the checkpoint's generation config must "
            f"be token ids from 0 to {len(lm.head) - 1}."
        )

    fits = [fit_prompt(lm, prompt, max_new_tokens) for prompt in prompts]
    truncated.new_tokens = sum(new_tokens < max_new_tokens for _, new_tokens in fits)
    truncated.prompts = sum(len(fitted) < len(prompt) for prompt, (fitted, _) in zip(prompts, fits, strict=True))
    if truncated.new_tokens:
        limit = max(len(fitted) + new_tokens for fitted, new_tokens in fits if new_tokens < max_new_tokens)
        warnings.append(
            f"warning: {truncated.new_tokens} of {len(prompts)} rows have fewer than {max_new_tokens} new tokens (the "
            f"minimum is {min(new_tokens for _, new_tokens in fits)}), and {truncated.prompts} rows lose the beginning "
            f"of their prompt: the model has {limit} positions."
        )
    elif truncated.prompts:
        warnings.append(
            f"warning: {truncated.prompts} of {len(prompts)} rows lose the beginning of their prompt: score keeps the "
            f"last {MAX_LENGTH} tokens."
        )
    return warnings


def method_line(lm: CausalLM, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A log line that names the decoding method, or None for the usual padded batches."""
    method = pick_method(lm, int(tokenizer.pad_token_id), 0)
    if method is PADDED:
        return None
    return f"{type(lm.model).__name__} does not decode exactly in padded batches: rows are generated {method.name}"


def generate_on_all_ranks(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    limits: GenerationLimits,
    *,
    end: int | None,
    label: str,
    quiet: bool,
    sample_keys: Sequence[str] | None = None,
) -> list[Generation]:
    """Generate the continuation of each prompt; the batches are divided among the ranks, and every rank gets all.

    Args:
        lm: the model.
        tokenizer: its tokenizer.
        examples: the examples to answer.
        prompts: the token ids of their prompts.
        limits: where batches and generations end.
        end: as for `generate`.
        label: the progress bar's label; it counts the rows of the main process.
        quiet: whether to hide the progress bar.
        sample_keys: as for `generate`.
    """
    own = examples_of_rank(lm, tokenizer, examples, limits, prompts)

    def generate_own() -> list[tuple[int, dict[str, Any]]]:
        batches = generate(
            lm,
            tokenizer,
            [examples[i] for i in own],
            **asdict(limits),
            prompts=[prompts[i] for i in own],
            end=end,
            sample_keys=None if sample_keys is None else [sample_keys[i] for i in own],
        )
        generated = []
        with progress_bar(label, len(own), "rows", quiet) as progress:
            for batch in batches:
                generated += [(own[i], asdict(generation)) for i, generation in batch]
                progress.advance(len(batch))
        return generated

    by_index = {i: generation for part in raise_on_any_rank(generate_own) for i, generation in part}
    return [Generation(**by_index[i]) for i in range(len(examples))]


@torch.no_grad()
def generate(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int,
    max_new_tokens: int,
    prompts: Sequence[Sequence[int]] | None = None,
    stop_early: bool = True,
    stop_texts: Sequence[str] = (),
    end: int | None = None,
    sample_keys: Sequence[str] | None = None,
) -> Iterator[list[tuple[int, Generation]]]:
    """Generate a continuation of each example's input, one batch at a time.

    In float32 the tokens are those of decoding each prompt alone, whatever state the model keeps; see
    `decoding_probe`.

    Args:
        lm: the model.
        tokenizer: its tokenizer. No chat template is applied, and no BOS token that the tokenizer does not add itself.
        examples: the examples to answer.
        batch_size: maximum number of prompts per batch.
        max_new_tokens: maximum number of tokens per generation.
        prompts: token ids to continue instead of the examples' inputs.
        end: a token that ends a generation, besides those of the tokenizer and of the generation config.
        stop_early: stop a generation once its scores are settled.
        stop_texts: texts before which the answer to a question ends.
        sample_keys: for each example, the key of the random numbers with which its tokens are sampled, see `sampling`.
            Without keys, decoding is greedy.

    Yields:
        One batch at a time, as pairs of an example's index and its Generation.
    """
    lm.model.eval()
    prompts = encode_prompts(examples, tokenizer, "plain") if prompts is None else prompts
    refuse_empty_prompts(examples, prompts)
    refuse_unknown_ids(((f"row {example.id}", ids) for example, ids in zip(examples, prompts, strict=True)), lm)

    answers = encode_texts(tokenizer, [" " + example.output for example in examples])
    windows = [max(WINDOW, 2 * len(ids)) for ids in answers]
    stops = [tuple(stop_texts) if example.kind == "qa" else () for example in examples]
    fits = [fit_prompt(lm, ids, max_new_tokens) for ids in prompts]

    for batch in _batches(examples, prompts, fits, batch_size):

        def is_done(place: int, ids: Sequence[int], batch: list[int] = batch) -> bool:
            """Whether a generation has reached a stop text, or is past its window and settled."""
            i = batch[place]
            if stops[i] and len(ids) % STRIDE == 0:
                text = to_generation(tokenizer, ids, 0, "").text
                if cut_at_stop_text(text, stops[i]) != text:
                    return True
            past = len(ids) - windows[i]
            if not stop_early or past < 0 or past % STRIDE:
                return False
            return is_settled(examples[i], to_generation(tokenizer, ids, 0, "").text)

        pick = _greedy if sample_keys is None else _sampler([sample_keys[i] for i in batch])
        generated = _decode(lm, tokenizer, [fits[i] for i in batch], is_done, end, pick)
        yield [
            (i, to_generation(tokenizer, ids, windows[i], ended, stops[i]))
            for i, (ids, ended) in zip(batch, generated, strict=True)
        ]


def _greedy(rows: Sequence[int], scores: Tensor) -> list[int]:
    tokens: list[int] = greedy_tokens(scores, "a generated token").tolist()
    return tokens


def _sampler(keys: Sequence[str]) -> Pick:
    """A function that samples the tokens of a batch, given the key of each of its rows."""
    streams = [random_stream(key) for key in keys]
    return lambda rows, scores: sampled_tokens(scores, [streams[row] for row in rows], "a generated token")


def _decode(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[Sequence[int], int]],
    is_done: Callable[[int, Sequence[int]], bool],
    end: int | None,
    pick: Pick,
) -> list[tuple[list[int], str]]:
    """Decode one batch of prompts, given with their limits of new tokens; returns new tokens and why they ended."""
    ends = eos_token_ids(lm, tokenizer) | ({end} if end is not None else frozenset())
    new_ids: list[list[int]] = [[] for _ in prompts]
    ended = ["limit"] * len(prompts)

    def choose(rows: Sequence[int], scores: Tensor) -> list[int | None]:
        tokens: list[int | None] = []
        for row, token in zip(rows, pick(rows, scores), strict=True):
            new_ids[row].append(token)
            if token in ends:
                ended[row] = "eos"
            elif is_done(row, new_ids[row]):
                ended[row] = "settled"
            continues = ended[row] == "limit" and len(new_ids[row]) < prompts[row][1]
            tokens.append(token if continues else None)
        return tokens

    batch = Prompts([ids for ids, _ in prompts], int(tokenizer.pad_token_id), max(limit for _, limit in prompts))
    decode_exactly(lm, batch, choose)
    return list(zip(new_ids, ended, strict=True))

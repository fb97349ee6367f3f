"""Let the teacher write a retain set itself, for users who have only the data to forget.

A model with a chat template writes both turns: it continues the template's beginning of a user's turn, and then answers
its own request (Magpie: Xu et al. 2024, arXiv 2406.08464). Any other model continues its BOS token. Tokens are drawn
from the model's own distribution, so the KL term is an average over what the model writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from neko_lean.cache.format import SELF_GENERATED
from neko_lean.cache.private_texts import PrivateTexts
from neko_lean.data import Example, PromptFormat, encode_prompts, encode_texts, is_file, special_tokens
from neko_lean.errors import NekoLeanError
from neko_lean.models import CausalLM, eos_token_ids, position_limit, refuse_unknown_ids
from neko_lean.terminal import log_line, progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_TOKENS = 256  # of a document, and of each turn
_BATCH_ROWS = 32
_MAX_ROUNDS = 8  # times the number of batches that would suffice if every row were usable
_MARKER = "neko0lean0marker"


class _UserTurn(NamedTuple):
    """How a chat template writes a user's turn: the text before the message, and what follows it."""

    before: str
    after: str

    @property
    def marks(self) -> list[str]:
        """The template's own text directly before and after a message. Where it occurs in a sample, the message ends.

        Only text with punctuation counts, because a plain word could belong to the message.
        """
        edges = [*self.before.split()[-1:], *self.after.split()[:1]]
        return [mark for mark in edges if not mark.isalnum()]


@torch.no_grad()
def self_generated_rows(
    teacher: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptFormat,
    count: int,
    *,
    max_length: int,
    seed: int,
    forget: Sequence[Example] = (),
    quiet: bool = False,
) -> list[dict[str, str]]:
    """Sample rows from the teacher.

    Rows that repeat the forget set are dropped and replaced by further ones, because what a model has memorized is
    among the likeliest that it writes, and must not be preserved. So are rows that repeat another row.

    Args:
        teacher: the model, in evaluation mode.
        tokenizer: its tokenizer.
        prompts: the prompt format. With a chat template, the rows are requests and answers; otherwise documents.
        count: number of rows.
        max_length: most tokens of a row.
        seed: random seed; the same seed gives the same rows on the same machine.
        forget: the examples to forget.
        quiet: whether to hide progress.

    Returns:
        Rows with the columns id and text, or id, prompt and response.

    Raises:
        NekoLeanError: if the tokenizer has no token to begin a document with, or the model writes too few usable rows.
    """
    turn = _user_turn(prompts)
    write: Callable[[], Iterator[tuple[str, ...]]]
    if turn is None:
        write = partial(_write_documents, teacher, tokenizer, max_length)
    else:
        write = partial(_write_conversations, teacher, tokenizer, prompts, turn, max_length)
    private = PrivateTexts(forget)
    num_batches = -(-count // _BATCH_ROWS)
    rows: dict[tuple[str, ...], None] = {}
    repeated = 0

    devices = [teacher.device] if teacher.device.type == "cuda" else []
    with torch.random.fork_rng(devices), progress_bar("self-generated", count, "rows", quiet) as progress:
        torch.manual_seed(seed)
        for _ in range(_MAX_ROUNDS * num_batches):
            before = len(rows)
            for texts in write():
                if private.occur_in(" ".join(texts)):
                    repeated += 1
                elif len(rows) < count:
                    rows[texts] = None
            progress.advance(len(rows) - before)
            if len(rows) == count:
                break

    if len(rows) < count:
        raise NekoLeanError(
            f"the model wrote only {len(rows)} usable rows of the {count} that --self-generated asks for ({repeated} "
            f"others repeat the forget set); ask for fewer, or give a retain set."
        )
    log_line(
        f"self-generated retain set: {count} {'documents' if turn is None else 'requests with answers'} written by the "
        f"model; {repeated} others repeated the forget set and were dropped",
        quiet,
    )
    columns = ("text",) if turn is None else ("prompt", "response")
    return [
        {"id": row_id, **dict(zip(columns, texts, strict=True))}
        for row_id, texts in zip(self_generated_ids(count, seed), rows, strict=True)
    ]


def self_generated_ids(count: int, seed: int) -> list[str]:
    """The ids of self-generated rows; they state the seed, so that rows of another seed are told apart."""
    return [f"self-{seed}-{number}" for number in range(1, count + 1)]


def self_generated_file(cache: str | Path) -> Path:
    """The file with the rows that the teacher of a cache wrote.

    Raises:
        NekoLeanError: if the cache was made from a retain set.
    """
    file = Path(cache) / SELF_GENERATED
    if not is_file(file):
        raise NekoLeanError(f"--retain is missing: give the retain set that the cache {cache} was made from.")
    return file


def writes_documents(prompts: PromptFormat) -> bool:
    """Whether a model writes documents in this format, because it applies no chat template; if it does, the model
    writes requests and answers."""
    return _user_turn(prompts) is None


def _user_turn(prompts: PromptFormat) -> _UserTurn | None:
    """How the format's chat template writes a user's turn, or None if it applies none."""
    rendered = prompts.render(Example("self", _MARKER, "x", "self", kind="qa"))
    before, found, after = rendered.prompt.partition(_MARKER)
    return _UserTurn(before, after) if found and rendered.has_special_tokens else None


def _write_documents(
    teacher: CausalLM, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[tuple[str, ...]]:
    """One batch of documents."""
    begin = encode_texts(tokenizer, [""])[0] or _first_token(tokenizer)
    new_tokens = max(1, min(_MAX_TOKENS, max_length - len(begin)))
    special = special_tokens(tokenizer)
    for ids in _sample(teacher, tokenizer, [begin] * _BATCH_ROWS, new_tokens, frozenset()):
        text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
        if text and not any(token in text for token in special):
            yield (text,)


def _first_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a text begins with if the tokenizer and the chat template write nothing before it."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise NekoLeanError(
            "the tokenizer has neither a BOS nor an EOS token for --self-generated to begin a text with; give a retain "
            "set."
        )
    return [int(first)]


def _write_conversations(
    teacher: CausalLM, tokenizer: PreTrainedTokenizerBase, prompts: PromptFormat, turn: _UserTurn, max_length: int
) -> Iterator[tuple[str, ...]]:
    """One batch of requests with their answers."""
    begin, after = tokenizer([turn.before, turn.after], add_special_tokens=False)["input_ids"]
    begin = begin or _first_token(tokenizer)
    new_tokens = min(_MAX_TOKENS, (max_length - len(begin) - len(after)) // 2)
    if new_tokens < 1:
        raise NekoLeanError(
            f"the chat template alone takes {len(begin) + len(after)} of the {max_length} tokens of a self-generated "
            f"row; raise max_length, or give a retain set."
        )
    special = special_tokens(tokenizer)
    ends = frozenset([] if prompts.end_of_turn is None else [prompts.end_of_turn])

    requests = [
        request
        for ids in _sample(teacher, tokenizer, [begin] * _BATCH_ROWS, new_tokens, ends)
        if (request := _message(tokenizer, ids, turn.marks, special))
    ]
    if not requests:
        return
    examples = [Example(f"self-{n}", request, "x", "self", kind="qa") for n, request in enumerate(requests)]
    answers = _sample(teacher, tokenizer, encode_prompts(examples, tokenizer, prompts), new_tokens, ends)
    for request, ids in zip(requests, answers, strict=True):
        if answer := _message(tokenizer, ids, turn.marks, special):
            yield request, answer


def _sample(
    teacher: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    ends: frozenset[int],
) -> list[list[int]]:
    """Sample a continuation of each prompt from the model's own distribution."""
    from transformers import GenerationConfig

    pad_id = int(tokenizer.pad_token_id)
    width = max(map(len, prompts))
    new_tokens = position_limit(teacher, width + new_tokens) - width
    if new_tokens < 1:
        raise NekoLeanError(
            f"the model has too few positions for --self-generated: its prompts alone have {width} tokens; give a "
            f"retain set."
        )
    # Padding on the left, so that every continuation begins in the same column.
    input_ids = torch.tensor([[pad_id] * (width - len(ids)) + list(ids) for ids in prompts], device=teacher.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=teacher.device)
    refuse_unknown_ids((("the beginning of a self-generated row", ids) for ids in prompts), teacher)
    all_ends = sorted(eos_token_ids(teacher, tokenizer) | ends)
    settings = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=new_tokens, pad_token_id=pad_id, eos_token_id=all_ends
    )
    model: Any = teacher.model
    # transformers fills in what `settings` does not state from the checkpoint's own generation config.
    own_settings, model.generation_config = model.generation_config, GenerationConfig()
    try:
        output = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=settings)
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise NekoLeanError("the model's output is NaN or infinite, so it cannot write a retain set.") from error
    finally:
        model.generation_config = own_settings
    continuations: list[list[int]] = output[:, width:].tolist()
    return continuations


def _message(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], marks: Sequence[str], special: Mapping[str, int]
) -> str:
    """The text of a sampled message up to the first special token or mark of the template.

    It is empty if the model spelled out a special token in other tokens: such a row could not be read back.
    """
    ends = set(special.values())
    end = next((place for place, number in enumerate(ids) if number in ends), len(ids))
    text = str(tokenizer.decode(list(ids[:end])))
    for mark in marks:
        text = text.split(mark)[0]
    return "" if any(token in text for token in special) else text.strip()

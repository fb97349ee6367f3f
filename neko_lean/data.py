"""Rows, prompt formats, tokenising, and batches without padding waste.

A row is `id, input, output, task` as in LUME (arXiv 2502.15097). Everything that reads a data file goes through
`read_rows`, so a bad file always ends in one sentence that names the file, the row and the column.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from neko_lean.errors import NekoLeanError
from neko_lean.files import Record, is_file, read_csv, read_jsonl, read_parquet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("id", "input", "output", "task")
TASKS = ("Task1", "Task2", "Task3")
FORMATS = ("plain", "neko")
SUFFIXES = (".parquet", ".jsonl", ".csv")  # in the order they are preferred when a folder holds several
_ID = re.compile(r"^(?P<document>.+?)(?P<kind>sc|qa)\d+$", re.DOTALL)


@dataclass(frozen=True)
class Row:
    """One prompt and its answer. `id` ends in sc<N> (sentence completion) or qa<N> (question answering)."""

    id: str
    input: str
    output: str
    task: str

    @property
    def kind(self) -> str:
        """'sc' or 'qa'."""
        return _split_id(self.id)[1]

    @property
    def document(self) -> str:
        """The id without its sc<N> or qa<N>: rows of one document share it."""
        return _split_id(self.id)[0]

    @property
    def digest(self) -> str:
        """16 hex digits of SHA-256 over the row's text: what the teacher cache knows a row by."""
        text = json.dumps([self.id, self.input, self.output], ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Encoded:
    """A tokenised row. `ids` holds the prompt's `prompt` tokens, then the answer's; `cut` tokens were dropped.

    `levels`, where an objective wants them, are the nats at which each token but the first counts as forgotten.
    """

    row: Row
    ids: list[int]
    prompt: int
    cut: int
    levels: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def answer(self) -> int:
        """Answer tokens left within the length limit."""
        return max(0, len(self.ids) - self.prompt)


def _split_id(row_id: str) -> tuple[str, str]:
    match = _ID.match(row_id)
    if match is None:
        raise NekoLeanError(f"id {row_id!r} ends in neither sc<N> nor qa<N>.")
    return match["document"], match["kind"]


def find_rows(path: str | Path, stem: str, split: str | None = None) -> Path:
    """The data file meant by `path`: the file itself, or in a folder `stem.*` (`stem_split*` when a split is named).

    Raises NekoLeanError when nothing fits. A folder with several formats of one set is read as parquet before jsonl
    before csv.
    """
    path = Path(path)
    if is_file(path):
        return path
    if not path.is_dir():
        missing = "is neither a file nor a folder" if path.exists() else "does not exist"
        raise NekoLeanError(f"{path} {missing}: give a parquet, jsonl or csv file, or a folder with {stem}.*.")
    name = f"{stem}_{split}" if split else stem
    for suffix in SUFFIXES:
        # The hub's parquet shards are called forget_train-00000-of-00001.parquet.
        for found in (path / f"{name}{suffix}", path / f"{name}-00000-of-00001{suffix}"):
            if is_file(found):
                return found
    raise NekoLeanError(f"{path} holds no {name}.parquet, {name}.jsonl or {name}.csv.")


def read_rows(path: str | Path, stem: str = "", split: str | None = None) -> list[Row]:
    """Read and check the rows of a parquet, jsonl or csv file, or of `stem.*` in a folder.

    Raises NekoLeanError naming file, row (counted from 1, without a CSV file's header) and column when a column is
    missing, the file is empty, a value is no text, an id has an unknown suffix or occurs twice, an input or output is
    empty, or a task is unknown; and for all that `files` refuses, such as surplus cells.
    """
    file = find_rows(path, stem, split)
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for number, record in enumerate(_records(file), start=1):
        row = _checked(record.values, record.where)
        if row.id in seen:
            raise NekoLeanError(f"{record.where}, column id: {row.id!r} is already the id of row {seen[row.id]}.")
        seen[row.id] = number
        rows.append(row)
    if not rows:
        raise NekoLeanError(f"{file} holds no rows.")
    return rows


def _checked(raw: dict[str, Any], where: str) -> Row:
    for column in COLUMNS:
        if column not in raw:
            raise NekoLeanError(f"{where}: column {column} is missing (needed: {', '.join(COLUMNS)}).")
        value = raw[column]
        if not isinstance(value, str):
            raise NekoLeanError(f"{where}, column {column}: expected text, found {type(value).__name__}.")
        if not value.strip():
            raise NekoLeanError(f"{where}, column {column}: is empty.")
    if _ID.match(raw["id"]) is None:
        raise NekoLeanError(f"{where}, column id: ends in neither sc<N> nor qa<N>.")
    if raw["task"] not in TASKS:
        raise NekoLeanError(f"{where}, column task: is not one of {', '.join(TASKS)}.")
    return Row(*(raw[column] for column in COLUMNS))


def _records(file: Path) -> Iterator[Record]:
    kind = file.suffix.lower()
    if kind == ".parquet":
        return read_parquet(file, COLUMNS)
    if kind == ".jsonl":
        return read_jsonl(file)
    if kind == ".csv":
        return read_csv(file, COLUMNS)
    raise NekoLeanError(f"{file} is neither .parquet nor .jsonl nor .csv.")


def write_jsonl(file: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write objects as JSON Lines."""
    file.write_text(jsonl_text(lines), encoding="utf-8")


def jsonl_text(lines: Iterable[Mapping[str, Any]]) -> str:
    """Objects as the text of a JSON Lines file."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def prompt_and_answer(row: Row, style: str) -> tuple[str, str]:
    """The text before the answer and the answer with its leading space, in format `style` ('plain' or 'neko').

    'plain' is what the shared task's scorer prompts with; 'neko' is the template of the paper's training code.
    """
    if style == "plain":
        return row.input, " " + row.output
    if style != "neko":
        raise NekoLeanError(f"format {style!r} is not one of {', '.join(FORMATS)}.")
    if "?" in row.input:
        return f"### Question: {row.input} ### Answer:", " " + row.output
    return f"### Text: {row.input}", " " + row.output


def encode(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    style: str,
    max_length: int,
    *,
    append_eos: bool = False,
) -> list[Encoded]:
    """Tokenise rows in `style`, cut to `max_length` tokens; with `append_eos` the answer ends in the EOS token.

    The prompt's tokens are those of the prompt alone, as the scorer will feed it, so answer positions are the ones
    that a generation has to produce. Raises NekoLeanError for `append_eos` with a tokenizer that has no EOS token.
    """
    if append_eos and tokenizer.eos_token_id is None:
        raise NekoLeanError(
            "this tokenizer has no EOS token, so answers cannot end in one: give it one, or set append_eos=false."
        )
    texts = [prompt_and_answer(row, style) for row in rows]
    prompts = encode_texts(tokenizer, [prompt for prompt, _ in texts])
    wholes = encode_texts(tokenizer, [prompt + answer for prompt, answer in texts])
    encoded = []
    for row, (_, answer), prompt_ids, whole_ids in zip(rows, texts, prompts, wholes, strict=True):
        ids = whole_ids
        if ids[: len(prompt_ids)] != prompt_ids:  # a merge across the border: keep the prompt as the scorer sees it
            ids = prompt_ids + _continuation(tokenizer, answer)
        if append_eos:
            ids = [*ids, tokenizer.eos_token_id]
        kept = ids[:max_length]
        encoded.append(Encoded(row, kept, min(len(prompt_ids), len(kept)), len(ids) - len(kept)))
    return encoded


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The token ids of a text that is to be continued: with the tokenizer's own prefix (BOS), without its suffix.

    Tokenizers with `add_eos_token`, a `[SEP]` or another template end every text in special tokens. A prompt must not
    end in them, and an answer gets its end only from `encode(append_eos=True)`. For a tokenizer that adds no suffix
    these are exactly the ids of `tokenizer(text)`. Special tokens that the text itself spells out stay.
    """
    return encode_texts(tokenizer, [text])[0]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """`encode_text` of many texts: the tokenizer is called for all of them at once."""
    if not texts:
        return []

    # verbose=False: that a text is longer than the tokenizer's limit is not said here, since callers cut.
    full: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"]
    prefix, suffix = added_tokens(tokenizer)
    if not suffix:
        return full

    bare = _without_special(tokenizer, texts)
    return [_without_suffix(*pair, prefix, suffix) for pair in zip(full, bare, strict=True)]


# Texts that end differently in nearly every vocabulary.
PROBES = ("a", "The sky is blue.", "7", "x y", "\u0436", "\u4e2d", "\n")


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after every text.

    They are what it adds to a few short texts, since post-processors come in many forms (templates, properties, code).
    Raises NekoLeanError for a tokenizer that adds different suffixes to different texts.
    """
    found = _added_to(tokenizer, PROBES)
    if not found:  # a vocabulary without any of these: take texts from it
        special = set(tokenizer.all_special_ids)
        known = [i for i in range(len(tokenizer)) if i not in special][:64:4]
        found = _added_to(tokenizer, [cast(str, tokenizer.decode([i])) for i in known])

    suffixes = sorted({suffix for _, suffix in found})
    if len(suffixes) > 1:
        raise NekoLeanError(
            f"this tokenizer ends some texts in the token ids {list(suffixes[0])} and others in {list(suffixes[1])}, "
            f"so a prompt's own tokens cannot be told from those that it appends: use a tokenizer that appends nothing."
        )
    if not found:
        raise NekoLeanError(
            "this tokenizer splits texts differently with its special tokens than without them, so what it appends to "
            "a prompt cannot be told from the prompt's own tokens: use a tokenizer that appends nothing."
        )
    prefix, suffix = min(found)
    return list(prefix), list(suffix)


def _added_to(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """What is added before and after each of `texts`, where that is not ambiguous."""
    if not texts:
        return set()
    full: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"]
    bare = _without_special(tokenizer, texts)
    if full == bare:
        return {((), ())}

    found = set()
    for ids, content in zip(full, bare, strict=True):
        last = len(ids) - len(content)
        places = [i for i in range(last + 1) if content and ids[i : i + len(content)] == content]
        if len(places) == 1:  # otherwise the text's own tokens look like those that are added
            found.add((tuple(ids[: places[0]]), tuple(ids[places[0] + len(content) :])))
    return found


def _without_suffix(full: list[int], content: list[int], prefix: list[int], suffix: list[int]) -> list[int]:
    """`full` less the suffix that was added to it; `content` are the ids without any added token."""
    for start in (prefix, []):  # some tokenizers leave out a prefix that the text itself begins with
        if full == [*start, *content, *suffix]:
            return [*start, *content]
        if full == [*start, *content]:  # and some a suffix that it ends in, as ByT5 does
            return full
    return full[: -len(suffix)] if full[-len(suffix) :] == suffix else full


def _without_special(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _continuation(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """The ids of an answer inside a text: before a text on its own, SentencePiece would put a space."""
    lead, whole, alone = _without_special(tokenizer, ["a", "a" + answer, answer])
    return whole[len(lead) :] if whole[: len(lead)] == lead else alone


def truncation_line(encoded: Sequence[Encoded], max_length: int) -> str:
    """How many rows the length limit cut, in words."""
    cut = sum(e.cut > 0 for e in encoded)
    return f"{cut} of {len(encoded)} rows cut to {max_length} tokens ({sum(e.cut for e in encoded)} tokens lost)"


def position_warning(encoded: Sequence[Encoded], limit: int, max_length: int) -> str | None:
    """That rows are cut because the model embeds no more than `limit` positions, or None where none is.

    `encoded` were cut to `limit`; `max_length` is the length that was asked for.
    """
    if limit >= max_length or not any(one.cut for one in encoded):
        return None
    return f"warning: the model has {limit} positions, fewer than the {max_length} asked for: " + truncation_line(
        encoded, limit
    )


def length_batches(lengths: Sequence[int], *, max_rows: int, max_tokens: int) -> list[list[int]]:
    """Indices of rows, in batches of at most `max_rows` rows and `max_tokens` positions, padding included.

    Rows of like length go together, shortest first, so the batches are the same on every run. A single row longer than
    `max_tokens` becomes a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        batch = batches[-1] if batches else []
        if not batch or len(batch) == max_rows or (len(batch) + 1) * lengths[index] > max_tokens:
            batch = []
            batches.append(batch)
        batch.append(index)
    return batches


def random_batches(lengths: Sequence[int], *, max_rows: int, max_tokens: int, rng: random.Random) -> list[list[int]]:
    """Indices of rows in random order, in batches of at most `max_rows` rows and `max_tokens` tokens.

    Long rows and short ones go together: batches by length would train long documents and short answers in turn, each
    undoing some of what the other did. A step puts rows of like length into micro-batches by itself.
    """
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches: list[list[int]] = []
    tokens = 0
    for index in order:
        if not batches or len(batches[-1]) == max_rows or tokens + lengths[index] > max_tokens:
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += lengths[index]
    return batches


def paired_batches(
    forget: Sequence[int],
    retain: Sequence[int],
    *,
    forget_rows: int,
    retain_rows: int,
    max_tokens: int,
    rng: random.Random,
) -> Iterator[tuple[list[int], list[int]]]:
    """Endless steps of (forget indices, retain indices), drawn from two lists of lengths; either list may be empty.

    Each set goes through its rows in an order of its own. A step of more than `max_tokens` tokens is halved.
    """

    def endless(lengths: Sequence[int], max_rows: int) -> Iterator[list[int]]:
        while lengths:
            yield from random_batches(lengths, max_rows=max_rows, max_tokens=max_tokens, rng=rng)
        yield from itertools.repeat([])

    def fits(left: list[int], right: list[int]) -> bool:
        tokens = sum(forget[i] for i in left) + sum(retain[i] for i in right)
        return tokens <= max_tokens or len(left) + len(right) <= 2

    if not forget and not retain:
        raise NekoLeanError("there are no rows to train on.")
    for pair in zip(endless(forget, forget_rows), endless(retain, retain_rows), strict=True):
        pending = [pair]
        while pending:
            one, two = pending.pop()
            if fits(one, two):
                yield one, two
            else:
                pending.append((one[: len(one) // 2], two[: len(two) // 2]))
                pending.append((one[len(one) // 2 :], two[len(two) // 2 :]))


def pad(rows: Sequence[Sequence[int]], pad_id: int, device: Any, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token lists as one rectangle: ids [B, L] int64 and a 0/1 mask [B, L], padded right (or left)."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        part = slice(length - len(row), length) if left else slice(0, len(row))
        ids[number, part] = torch.tensor(row)
        mask[number, part] = 1
    return ids.to(device), mask.to(device)

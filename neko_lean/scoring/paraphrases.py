"""Paraphrases that the user provides: of prompts, for an attack, and of answers, for the truth ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neko_lean.data import Example, is_file, read_jsonl
from neko_lean.errors import NekoLeanError


@dataclass(frozen=True)
class Paraphrase:
    """A paraphrase of one example.

    Attributes:
        id: the example's id.
        input: a paraphrase of its prompt, or None.
        output: a paraphrase of its answer, or None.
        wrong: wrong answers; given if and only if `output` is.
    """

    id: str
    input: str | None
    output: str | None
    wrong: tuple[str, ...]


def read_paraphrases(path: str | Path, examples: Sequence[Example]) -> list[Paraphrase]:
    """Read a JSONL file of paraphrases; an example may have several.

    Args:
        path: the file. Each line has an `id`, and `input`, or `output` and `wrong` (a list of texts), or all three.
        examples: the examples that the ids must refer to.

    Raises:
        NekoLeanError: the file is missing or empty, or a line is not as described; names file, line and column.
    """
    file = Path(path)
    if not is_file(file):
        problem = "is not a file" if file.exists() else "does not exist"
        raise NekoLeanError(f"{file} {problem}; --paraphrases needs a JSONL file with id, input, output, wrong.")
    by_id: dict[str, set[Example]] = {}
    for example in examples:
        by_id.setdefault(example.id, set()).add(example)

    paraphrases = [_checked(values, where, by_id) for where, values in read_jsonl(file)]
    if not paraphrases:
        raise NekoLeanError(f"{file} holds no paraphrases; add at least one line, or leave out --paraphrases.")
    return paraphrases


def _checked(values: Mapping[str, Any], where: str, by_id: Mapping[str, set[Example]]) -> Paraphrase:
    """A line of the file as a Paraphrase; `where` names the line in errors."""
    name, wrong = values.get("id"), values.get("wrong", [])
    if not isinstance(name, str) or name not in by_id:
        raise NekoLeanError(f"{where}, column id: expected the id of a scored row.")
    if len(by_id[name]) > 1:
        raise NekoLeanError(
            f"{where}, column id: {name!r} is the id of a forget row and of a retain row, so it is ambiguous; rename "
            f"one of the two rows."
        )

    for column in ("input", "output"):
        text = values.get(column)
        if text is not None and not (isinstance(text, str) and text.strip()):
            raise NekoLeanError(f"{where}, column {column}: expected a non-empty text.")
    if not isinstance(wrong, list) or not all(isinstance(text, str) and text.strip() for text in wrong):
        raise NekoLeanError(f"{where}, column wrong: expected a list of non-empty texts.")

    has_output = values.get("output") is not None
    if has_output != bool(wrong) or (not has_output and values.get("input") is None):
        raise NekoLeanError(f"{where}: expected an input, or an output together with wrong answers.")
    return Paraphrase(name, values.get("input"), values.get("output"), tuple(wrong))

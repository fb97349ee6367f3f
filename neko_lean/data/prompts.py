"""Prompt formats: the text before an answer, and the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neko_lean.errors import NekoLeanError

if TYPE_CHECKING:
    pass
from neko_lean.data.examples import Example

FORMATS = ("plain", "neko")


def prompt_and_answer(row: Example, style: str) -> tuple[str, str]:
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

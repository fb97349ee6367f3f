"""Prompt formats: how an example becomes the text of a prompt and of an answer.

A prompt format is a function that `@prompt_format` registers under the name by which recipes select it. The answer it
returns starts with the space that separates it from the prompt.
"""

from __future__ import annotations

from collections.abc import Callable

from neko_lean.data.examples import Example
from neko_lean.errors import NekoLeanError, did_you_mean

PromptFormat = Callable[[Example], tuple[str, str]]

_REGISTRY: dict[str, PromptFormat] = {}


def prompt_format(name: str) -> Callable[[PromptFormat], PromptFormat]:
    """Decorator that registers a prompt format under `name`."""

    def register(function: PromptFormat) -> PromptFormat:
        _REGISTRY[name] = function
        return function

    return register


@prompt_format("plain")
def plain(example: Example) -> tuple[str, str]:
    """The input without a template, as in the scorer of LUME's shared task."""
    return example.input, " " + example.output


@prompt_format("neko")
def neko(example: Example) -> tuple[str, str]:
    """The template of the NEKO paper's training code, which distinguishes questions from other texts."""
    if "?" in example.input:
        return f"### Question: {example.input} ### Answer:", " " + example.output
    return f"### Text: {example.input}", " " + example.output


FORMATS = tuple(_REGISTRY)


def prompt_and_answer(example: Example, format_name: str) -> tuple[str, str]:
    """The prompt and the answer of an example, in the prompt format `format_name`.

    Raises:
        NekoLeanError: If there is no such prompt format.
    """
    if format_name not in _REGISTRY:
        raise NekoLeanError(f"unknown prompt format {format_name!r}{did_you_mean(format_name, FORMATS)}")
    return _REGISTRY[format_name](example)

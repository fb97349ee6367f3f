"""Prompt formats: how an example becomes the text of a prompt and of an answer.

A text format is a function that `@prompt_format` registers under the name by which recipes select it. The answer it
returns starts with the space that separates it from the prompt. `chat` and `auto` apply the tokenizer's chat template
(see `chat_templates`), and a file holds a template of the user's own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from neko_lean.data.chat_templates import ChatTemplate, chat_template
from neko_lean.data.examples import Example
from neko_lean.data.files import is_file, read_text
from neko_lean.errors import NekoLeanError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TextFormat = Callable[[Example], tuple[str, str]]

_REGISTRY: dict[str, TextFormat] = {}

TEMPLATE_SUFFIXES = (".jinja", ".txt")

# What a cache records: a text format by its name, anything else by the digest of what it renders with.
_RECORDED = re.compile(r"(?:chat|auto|file):[0-9a-f]{16}")


class RenderedExample(NamedTuple):
    """The texts of an example in a prompt format.

    Attributes:
        prompt: What the model is given.
        answer: What it has to produce, with the separator from the prompt, and with the end-of-turn token of a chat
            template.
        has_special_tokens: The texts spell out their special tokens, so the tokenizer must not add any.
    """

    prompt: str
    answer: str
    has_special_tokens: bool = False


@dataclass(frozen=True)
class PromptFormat:
    """A prompt format for one tokenizer.

    Attributes:
        name: Identifies the format in a cache. Two formats with the same name render every example alike.
        label: A short description for the log.
        write: Makes the texts of an example that has a prompt.
        end_of_turn: The token with which the template ends an answer, if it does.
    """

    name: str
    label: str
    write: Callable[[Example], RenderedExample]
    end_of_turn: int | None = None

    def render(self, example: Example) -> RenderedExample:
        """The texts of an example. A document without a prompt stays as it is."""
        if example.kind == "document" and not example.input:
            return RenderedExample("", example.output)
        return self.write(example)


def prompt_format(name: str) -> Callable[[TextFormat], TextFormat]:
    """Decorator that registers a text format under `name`."""

    def register(function: TextFormat) -> TextFormat:
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


@prompt_format("tofu")
def tofu(example: Example) -> tuple[str, str]:
    """TOFU's tags for models without a chat template (arXiv 2401.06121)."""
    return f"Question: {example.input}\nAnswer:", " " + example.output


def format_names() -> tuple[str, ...]:
    """The names of all prompt formats."""
    return ("auto", *_REGISTRY, "chat")


def check_format_name(name: str) -> None:
    """Raise NekoLeanError unless `name` is a prompt format or a template file."""
    if name in format_names():
        return
    if Path(name).suffix not in TEMPLATE_SUFFIXES:
        raise NekoLeanError(f"unknown prompt format {name!r}{did_you_mean(name, format_names())}")
    if not is_file(Path(name)):
        names = ", ".join(format_names())
        raise NekoLeanError(f"the prompt template {name} does not exist; give one of {names}, or a file.")


def is_recorded_format(name: str) -> bool:
    """Whether a cache can have been made in a format of this name."""
    return name in _REGISTRY or _RECORDED.fullmatch(name) is not None


def find_format(name: str, tokenizer: PreTrainedTokenizerBase, system: str = "") -> PromptFormat:
    """The prompt format of this name for a tokenizer.

    Args:
        name: "plain", "neko" or "tofu"; "chat" for the tokenizer's chat template; "auto" for the chat template where
            the tokenizer has one and the example is a question or a conversation, and "plain" otherwise; or a file: a
            Jinja chat template (.jinja), or a text with the placeholders {prompt} and {answer} (.txt).
        tokenizer: The model's tokenizer.
        system: The system message of a chat template.

    Raises:
        NekoLeanError: If there is no such format, if the tokenizer has no chat template, or if `system` has no effect.
    """
    check_format_name(name)
    template = None
    if name in ("chat", "auto"):
        template = chat_template(tokenizer, system)
    elif Path(name).suffix == ".jinja":
        template = chat_template(tokenizer, system, read_text(Path(name)))

    if template is None:
        if system:
            raise NekoLeanError(f"--system has no effect: format {name} applies no chat template; leave it out.")
        if name == "chat":
            raise NekoLeanError("the tokenizer has no chat template; use --format plain, or give a .jinja file.")
        return _text_format(name)
    if name == "auto":
        label = "chat template for questions and conversations, plain text otherwise"
        return _with_template(template, f"auto:{template.digest}", label, lambda example: example.kind == "qa")
    kind = "chat" if name == "chat" else "file"
    return _with_template(template, f"{kind}:{template.digest}", f"chat template ({name})", lambda example: True)


def _with_template(template: ChatTemplate, name: str, label: str, applies: Callable[[Example], bool]) -> PromptFormat:
    """The format that uses a chat template for the examples to which it applies, and plain text for the others."""

    def write(example: Example) -> RenderedExample:
        if example.input and applies(example):
            return RenderedExample(*template.render(example), has_special_tokens=True)
        return RenderedExample(*plain(example))

    return PromptFormat(name, label, write, template.end_of_turn)


def _text_format(name: str) -> PromptFormat:
    """A registered text format, or the one in a text file."""
    if name == "auto":
        name = "plain"
    if name in _REGISTRY:
        function = _REGISTRY[name]
        return PromptFormat(name, name, lambda example: RenderedExample(*function(example)))

    text = read_text(Path(name))
    before, separator, after = text.partition("{answer}")
    if not separator or "{prompt}" not in before:
        raise NekoLeanError(f"{name}: a prompt template needs {{prompt}}, and {{answer}} after it.")
    answer_gap = before[len(before.rstrip(" ")) :]  # most tokenizers merge a space with the word after it
    before, after = before.rstrip(" "), after.rstrip()

    def write(example: Example) -> RenderedExample:
        return RenderedExample(before.replace("{prompt}", example.input), f"{answer_gap}{example.output}{after}")

    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return PromptFormat(f"file:{digest}", name, write)

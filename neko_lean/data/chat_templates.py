"""Apply a tokenizer's chat template to a prompt and its answer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, cast

from neko_lean.data.examples import Example, Message
from neko_lean.data.special_tokens import special_tokens
from neko_lean.errors import NekoLeanError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For templates that write a date into the system message, as Llama 3.2's does: a cache and the run that reads it need
# the same text on every day.
_DATE = datetime(2024, 7, 26)


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with a tokenizer and a system message.

    Attributes:
        tokenizer: The tokenizer whose special tokens the template uses.
        template: The template, in Jinja.
        system: The system message; "" for none, or for the template's own.
        special_tokens: The ids of the tokenizer's special tokens by their texts, longest first.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    system: str
    special_tokens: Mapping[str, int]

    @property
    def end_of_turn(self) -> int | None:
        """The token with which the template ends the assistant's turn, if it is a special token."""
        _, answer = self.render(Example("probe", "a", "b", ""))
        return self._last_special_token(answer)

    @property
    def digest(self) -> str:
        """16 hex digits of the SHA-256 of what determines the rendered texts.

        A template that writes the day's date itself renders other prompts tomorrow, so it has another digest then.
        """
        parts = [self.template, self.system]
        if "strftime_now" in self.template:
            parts += self.render(Example("probe", "a", "b", ""))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def render(self, example: Example) -> tuple[str, str]:
        """The prompt and the answer of an example, with all special tokens.

        The answer ends with the template's end of turn.

        Raises:
            NekoLeanError: If the example's texts contain special tokens, as they do if a template was applied to them
                already, or if the template refuses the messages or changes them when the answer follows.
        """
        messages = example.messages or (Message("user", example.input),)
        self._refuse_special_tokens(example, [*messages, Message("assistant", example.output)])
        if self.system:
            if messages[0].role == "system":
                raise NekoLeanError(
                    f"row {example.id}: --system has no effect, because the row has its own system message; leave it "
                    f"out."
                )
            messages = (Message("system", self.system), *messages)

        prompt = self._render(example.id, messages, add_generation_prompt=True)
        whole = self._render(example.id, (*messages, Message("assistant", example.output)))
        if not whole.startswith(prompt):
            raise NekoLeanError(
                f"row {example.id}: the chat template writes the prompt differently when the answer follows, so the "
                f"answer cannot be told from it; use --format plain, or give another template as a .jinja file."
            )
        return prompt, self._without_text_after_turn(whole[len(prompt) :])

    def _render(self, row_id: str, messages: tuple[Message, ...], *, add_generation_prompt: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": message.role, "content": message.content} for message in messages],
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=False,
                date_string=_DATE.strftime("%d %b %Y"),
            )
        except Exception as error:  # Jinja's own errors, and those that a template raises
            raise NekoLeanError(
                f"row {row_id}: the chat template refuses the messages ({first_line(error)}); change the messages, or "
                f"use --format plain."
            ) from error
        return cast(str, text)

    def _last_special_token(self, text: str) -> int | None:
        """The id of the special token with which a text ends."""
        return next((number for token, number in self.special_tokens.items() if text.endswith(token)), None)

    def _without_text_after_turn(self, answer: str) -> str:
        """Remove the whitespace that separates turns, which a model does not generate after its end of turn."""
        stripped = answer.rstrip()
        return stripped if self._last_special_token(stripped) is not None else answer

    def _refuse_special_tokens(self, example: Example, messages: Sequence[Message]) -> None:
        """Raise NekoLeanError if a message spells out a special token: the template would be applied twice."""
        for token in self.special_tokens:
            if any(token in message.content for message in messages):
                raise NekoLeanError(
                    f"row {example.id}: the text contains {token!r}, a special token, so a chat template seems to be "
                    f"applied already; remove it, or use --format plain."
                )


def chat_template(tokenizer: PreTrainedTokenizerBase, system: str, template: str | None = None) -> ChatTemplate | None:
    """The tokenizer's chat template, or `template` with this tokenizer; None if it has none."""
    if template is None:
        try:
            template = tokenizer.get_chat_template()
        except ValueError:
            if not tokenizer.chat_template:
                return None
            raise NekoLeanError(
                "the tokenizer has several chat templates but none is called 'default'; give one as a .jinja file."
            ) from None
    return ChatTemplate(tokenizer, template, system, special_tokens(tokenizer))

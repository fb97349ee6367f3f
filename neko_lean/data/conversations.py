"""Conversations: lists of messages, whose last message is the answer and whose other messages are the prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from neko_lean.data.example_types import Example, Message
from neko_lean.data.jsonl_files import parse_json
from neko_lean.errors import NekoLeanError

_KEYS = (("role", "content"), ("from", "value"))  # the second pair is that of ShareGPT

_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}


def parse_messages(value: Any, where: str) -> tuple[Message, ...]:
    """The messages of a cell.

    Args:
        value: A list of `{"role": ..., "content": ...}` or `{"from": ..., "value": ...}`, or the JSON text of one.
        where: The row and the column, for error messages.

    Raises:
        NekoLeanError: If the value is not such a list, a role is unknown, or a content is not text. Only the content
            of a system message may be empty.
    """
    if isinstance(value, str):
        value = parse_json(value, where)
    if not isinstance(value, list) or not value:
        raise NekoLeanError(f"{where} must be a non-empty list of messages with role and content.")
    return tuple(_message(item, f"{where}, message {number}") for number, item in enumerate(value, start=1))


def split_answer(messages: tuple[Message, ...], where: str) -> tuple[tuple[Message, ...], str]:
    """Split a conversation into the messages before the answer, and the answer.

    Raises:
        NekoLeanError: If the last message is not the assistant's, or no user message comes before it.
    """
    if messages[-1].role != "assistant":
        raise NekoLeanError(
            f"{where} must end with a message of the assistant, which is the answer to learn or forget."
        )
    if not any(message.role == "user" for message in messages[:-1]):
        raise NekoLeanError(f"{where} has no user message before the answer; add one.")
    return messages[:-1], messages[-1].content


def prompt_text(messages: tuple[Message, ...]) -> str:
    """The text of a conversation up to the answer, for prompt formats that are not chat templates.

    Returns:
        The content of the only turn of the user, or several turns as lines that start with "User:" or "Assistant:".
    """
    turns = [message for message in messages if message.role != "system"]
    if len(turns) == 1:
        return turns[0].content
    return "\n".join(f"{message.role.capitalize()}: {message.content}" for message in messages if message.content)


def with_prompt(example: Example, text: str) -> Example:
    """The example with another prompt. In a conversation, it replaces the last message of the user."""
    if not example.messages:
        return replace(example, input=text)
    last = max(place for place, message in enumerate(example.messages) if message.role == "user")
    messages = (*example.messages[:last], Message("user", text), *example.messages[last + 1 :])
    return replace(example, input=prompt_text(messages), messages=messages)


def _message(item: Any, where: str) -> Message:
    keys = next((keys for keys in _KEYS if isinstance(item, dict) and all(key in item for key in keys)), None)
    if keys is None:
        raise NekoLeanError(f"{where} must be an object with the keys role and content.")

    role, content = (item[key] for key in keys)
    if not isinstance(role, str) or role not in _ROLES:
        raise NekoLeanError(f"{where}: the {keys[0]} must be system, user or assistant.")
    if not isinstance(content, str):
        raise NekoLeanError(f"{where}: the {keys[1]} has type {type(content).__name__}; expected a string.")
    if not content.strip() and _ROLES[role] != "system":
        raise NekoLeanError(f"{where}: the {keys[1]} is empty; every message needs a text.")
    return Message(_ROLES[role], content)

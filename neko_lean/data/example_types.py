"""What an example is: a prompt and its answer, or a document, before and after tokenization."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

COLUMNS = ("id", "input", "output", "task")  # LUME's layout (arXiv 2502.15097)

STATED_COLUMNS = ("kind", "document", "messages")  # what `Example.row` adds where LUME's layout does not imply it

TASKS = ("Task1", "Task2", "Task3")

LUME_ID = re.compile(r"^(?P<document>.+?)(?P<kind>sc|qa)\d+$", re.DOTALL)

Kind = Literal["completion", "qa", "document"]


class Message(NamedTuple):
    """One message of a conversation: `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """A prompt and its answer.

    Attributes:
        id: Unique within a set.
        input: The prompt, before a prompt format is applied. Empty for a document.
        output: The answer, or the text of a document.
        task: The group that the example's scores are reported under, such as "Task1" or "biography".
        kind: "completion" (a text and its continuation), "qa" (a question or a request), or "document" (a whole text
            without a prompt). If it is not given, it follows from the id as LUME writes it: sc<N> is a completion and
            qa<N> is a question; any other id is a completion.
        document: Examples about the same document share it, and statistics resample them together. If it is not given,
            it is the id without LUME's sc<N> or qa<N>.
        messages: The conversation up to the answer, if the data states one; a chat template is applied to it.
    """

    id: str
    input: str
    output: str
    task: str
    kind: Kind = ""  # type: ignore[assignment]  # set in __post_init__
    document: str = ""
    messages: tuple[Message, ...] = ()

    def __post_init__(self) -> None:
        match = LUME_ID.match(self.id)
        if not self.kind:
            object.__setattr__(self, "kind", "qa" if match and match["kind"] == "qa" else "completion")
        if not self.document:
            object.__setattr__(self, "document", match["document"] if match else self.id)

    @property
    def text(self) -> str:
        """The whole text: prompt and answer, joined by a space."""
        return f"{self.input} {self.output}" if self.input else self.output

    @property
    def lume_row(self) -> dict[str, str]:
        """The example's columns in LUME's layout."""
        return {column: getattr(self, column) for column in COLUMNS}

    @property
    def row(self) -> dict[str, Any]:
        """A row from which `read_rows` restores this example: LUME's columns, and STATED_COLUMNS if they are needed."""
        implied = Example(self.id, self.input, self.output, self.task)
        if LUME_ID.match(self.id) and self == implied:
            return dict(self.lume_row)
        messages = [message._asdict() for message in self.messages]
        return {**self.lume_row, "kind": self.kind, "document": self.document, "messages": messages}

    @property
    def digest(self) -> str:
        """16 hex digits of the SHA-256 of id, input and output. The teacher cache identifies an example by it."""
        parts = [self.id, self.input, self.output]
        text = json.dumps([*parts, self.messages] if self.messages else parts, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class EncodedExample:
    """A tokenized example: `prompt_length` prompt tokens, then the answer's tokens.

    Attributes:
        example: The example that was tokenized.
        input_ids: The token ids of prompt and answer, after truncation.
        prompt_length: How many of `input_ids` belong to the prompt.
        num_truncated: How many tokens the length limit removed from the end.
        levels: For each token after the first, the loss in nats at which it counts as forgotten. Only set for
            objectives that use it.
        num_context: How many of the first tokens the previous window of the same text has predicted already.
        num_following: How many tokens of the text are in later windows.
        end_length: How many special tokens end the answer, such as EOS or a chat template's end of turn.
        shots: Token ids of other examples, which the teacher reads before this one. They do not count in its length.
    """

    example: Example
    input_ids: list[int]
    prompt_length: int
    num_truncated: int
    levels: tuple[float, ...] | None = None
    num_context: int = 0
    num_following: int = 0
    end_length: int = 0
    shots: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def ids_with_shots(self) -> list[int]:
        """What the teacher reads: the shots, then the example's own tokens."""
        return [*self.shots, *self.input_ids]

    @property
    def answer_length(self) -> int:
        """How many answer tokens the length limit left."""
        return max(0, len(self.input_ids) - self.prompt_length)

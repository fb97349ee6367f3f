"""The anchor: text that the model never saw, of the kinds that it has to forget.

The teacher's losses on it tell what unseen text costs, and the student's behaviour on it is preserved as on the retain
set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from neko_lean.data.documents import ANCHOR_TASK, read_records, text_column, to_documents
from neko_lean.data.example_types import EncodedExample, Example
from neko_lean.data.examples import RowSource, read_rows
from neko_lean.data.tokenization import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from neko_lean.data.prompts import PromptFormat

_HINT = "an anchor is a file with documents, or with rows like those of the forget set"


def read_anchor(path: RowSource, columns: str | Mapping[str, str] | None = None) -> list[Example]:
    """Read the anchor as examples, which caches and batches treat like retain examples.

    Args:
        path: Documents, as for `read_documents`, become examples with an empty prompt. Their optional column `task`
            names the task whose forget examples a document resembles. Without a column `document` or `text`, the rows
            are prompts with answers, as for `read_rows`.
        columns: As for `read_rows`.

    Raises:
        NekoLeanError: If the file does not exist, is empty, or contains an invalid row.
    """
    records = read_records(path, _HINT)
    if text_column(records) is None:
        rows = read_rows(path, columns=columns)
        return [replace(row, id=_id(number), document=_id(number)) for number, row in enumerate(rows, start=1)]
    documents = enumerate(to_documents(records), start=1)
    return [Example(_id(number), "", text, task) for number, (text, task) in documents]


def encode_anchor(
    anchor: Sequence[Example], tokenizer: PreTrainedTokenizerBase, prompts: PromptFormat, max_length: int
) -> list[EncodedExample]:
    """Tokenize the anchor with `encode`: documents as they are, and rows with a prompt in the prompt format."""
    documents = iter(encode([row for row in anchor if _is_document(row)], tokenizer, "plain", max_length))
    others = iter(encode([row for row in anchor if not _is_document(row)], tokenizer, prompts, max_length))
    return [next(documents if _is_document(row) else others) for row in anchor]


def _id(number: int) -> str:
    return f"{ANCHOR_TASK} {number}"


def _is_document(row: Example) -> bool:
    return not row.input and not row.messages

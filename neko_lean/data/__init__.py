"""Read examples from files, format and tokenize them, and group them into batches."""

from neko_lean.data.anchor import encode_anchor, read_anchor
from neko_lean.data.batching import length_batches, pad, paired_batches, random_batches
from neko_lean.data.columns import parse_columns
from neko_lean.data.conversations import with_prompt
from neko_lean.data.csv_files import csv_cells, read_csv
from neko_lean.data.documents import ANCHOR_TASK, Document, read_documents
from neko_lean.data.example_types import TASKS, EncodedExample, Example, Message
from neko_lean.data.examples import (
    Rows,
    RowSource,
    count_lost_answers,
    describe_rows,
    paths_among,
    read_rows,
    refuse_unused_split,
    require_folder,
)
from neko_lean.data.files import Record, is_file, read_text
from neko_lean.data.hub import require_hub_package
from neko_lean.data.jsonl_files import read_jsonl
from neko_lean.data.overlap import overlapping, unseen_anchor, without_overlap
from neko_lean.data.parquet_files import read_parquet
from neko_lean.data.prompts import PromptFormat, check_format_name, find_format, is_recorded_format
from neko_lean.data.scripts import fold, words
from neko_lean.data.similarity import PromptIndex
from neko_lean.data.sources import SUFFIXES, holds_only_texts
from neko_lean.data.special_tokens import special_tokens
from neko_lean.data.substitutes import random_answers, refusals, similar_answers
from neko_lean.data.tokenization import (
    continuation_ids,
    encode,
    encode_prompts,
    encode_texts,
    log_truncation,
    position_warning,
    truncation_summary,
)

__all__ = [
    "ANCHOR_TASK",
    "SUFFIXES",
    "TASKS",
    "Document",
    "EncodedExample",
    "Example",
    "Message",
    "PromptFormat",
    "PromptIndex",
    "Record",
    "RowSource",
    "Rows",
    "check_format_name",
    "continuation_ids",
    "count_lost_answers",
    "csv_cells",
    "describe_rows",
    "encode",
    "encode_anchor",
    "encode_prompts",
    "encode_texts",
    "find_format",
    "fold",
    "holds_only_texts",
    "is_file",
    "is_recorded_format",
    "length_batches",
    "log_truncation",
    "overlapping",
    "pad",
    "paired_batches",
    "parse_columns",
    "paths_among",
    "position_warning",
    "random_answers",
    "random_batches",
    "read_anchor",
    "read_csv",
    "read_documents",
    "read_jsonl",
    "read_parquet",
    "read_rows",
    "read_text",
    "refusals",
    "refuse_unused_split",
    "require_folder",
    "require_hub_package",
    "similar_answers",
    "special_tokens",
    "truncation_summary",
    "unseen_anchor",
    "with_prompt",
    "without_overlap",
    "words",
]

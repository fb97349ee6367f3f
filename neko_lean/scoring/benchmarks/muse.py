"""MUSE: Machine Unlearning Six-Way Evaluation (arXiv 2407.06460), with OpenUnlearning's metrics (arXiv 2506.12618).

Four of its numbers are computed on one model: verbatim memorisation, knowledge memorisation, privacy leakage, and
utility preservation. Its two corpora, news and Harry Potter books, are scored alike.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from neko_lean.data import EncodedExample, Example, PromptFormat, encode, encode_texts
from neko_lean.data.examples import Message
from neko_lean.data.prompts import RenderedExample, plain
from neko_lean.models import position_limit
from neko_lean.scoring.benchmarks.answers import (
    answer_views,
    generated_answers,
    logp_without_end,
    memorisation_means,
    reference_answers,
)
from neko_lean.scoring.benchmarks.metrics import CHANCE_AUC, min_k_auc, privleak, rouge_f1
from neko_lean.scoring.benchmarks.rows import benchmark_rows, text_of
from neko_lean.scoring.generation import GenerationLimits
from neko_lean.scoring.limits import MAX_LENGTH
from neko_lean.scoring.measure import ScoringContext
from neko_lean.scoring.views import tokenize_documents, view_documents
from neko_lean.terminal import progress_bar

VERBATIM_TOKENS = 128  # new tokens of a continuation
KNOWLEDGE_TOKENS = 32  # new tokens of an answer
STOP_TEXTS = ("\n\n", "\nQuestion", "Question:")  # an answer ends where the model writes the next question
SUFFIXES = (".jsonl", ".json")


@dataclass(frozen=True)
class MuseRows:
    """The rows that MUSE scores a model on.

    Attributes:
        verbatim: beginnings of forget texts and their continuations.
        forget_knowledge: questions about the forget texts, with in-context examples.
        retain_knowledge: questions about the retain texts, with in-context examples.
        forget_texts: texts of the forget set, for the min-k attack.
        holdout_texts: similar texts that no model was trained on.
    """

    verbatim: list[Example]
    forget_knowledge: list[Example]
    retain_knowledge: list[Example]
    forget_texts: list[str]
    holdout_texts: list[str]

    @property
    def by_split(self) -> dict[str, list[Example]]:
        """The forget set and the retain set of the ordinary score."""
        return {"forget": [*self.verbatim, *self.forget_knowledge], "retain": self.retain_knowledge}


def read_muse(folder: str | Path) -> MuseRows:
    """Read MUSE's rows from JSON Lines files, in one folder for each of the data set's configurations.

    | files | columns |
    |---|---|
    | `verbmem/forget` | `prompt`, `gt` |
    | `knowmem/forget_qa`, `knowmem/retain_qa` | `question`, `answer` |
    | `knowmem/forget_qa_icl`, `knowmem/retain_qa_icl` | `question`, `answer` of the in-context examples |
    | `privleak/forget`, `privleak/holdout` | `text` |

    Args:
        folder: contains the folders; the files have the suffix .jsonl or .json.

    Raises:
        NekoLeanError: a file is missing, empty or invalid.
    """
    folder = Path(folder)

    def rows(name: str, *columns: str) -> list[tuple[str, ...]]:
        records = benchmark_rows(folder, tuple(name + suffix for suffix in SUFFIXES), "MUSE")
        return [tuple(text_of(record, column) for column in columns) for record in records]

    def questions(split: str) -> list[Example]:
        in_context = rows(f"knowmem/{split}_qa_icl", "question", "answer")
        return [
            question_with_examples(f"{split} question {number}", in_context, question, answer)
            for number, (question, answer) in enumerate(rows(f"knowmem/{split}_qa", "question", "answer"), start=1)
        ]

    verbatim = rows("verbmem/forget", "prompt", "gt")
    return MuseRows(
        verbatim=[
            Example(f"verbatim {number}", prompt, continuation, "MUSE", kind="completion")
            for number, (prompt, continuation) in enumerate(verbatim, start=1)
        ],
        forget_knowledge=questions("forget"),
        retain_knowledge=questions("retain"),
        forget_texts=[text for (text,) in rows("privleak/forget", "text")],
        holdout_texts=[text for (text,) in rows("privleak/holdout", "text")],
    )


def question_with_examples(
    example_id: str, in_context: Sequence[tuple[str, ...]], question: str, answer: str
) -> Example:
    """A question after in-context examples, both as a text in MUSE's wording and as the messages of a conversation.

    Args:
        example_id: id of the example.
        in_context: questions and answers that come first.
        question: the question.
        answer: its answer.

    Example:
        >>> question_with_examples("q1", [("Who?", "Foo.")], "Where?", "Here.").input
        'Question: Who?\\nAnswer: Foo.\\n\\nQuestion: Where?\\nAnswer:'
    """
    before = "".join(f"Question: {asked}\nAnswer: {answered}\n\n" for asked, answered in in_context)
    messages = [
        message
        for asked, answered in in_context
        for message in (Message("user", asked), Message("assistant", answered))
    ]
    return Example(
        example_id,
        f"{before}Question: {question}\nAnswer:",
        answer,
        "MUSE",
        kind="qa",
        messages=(*messages, Message("user", question)),
    )


def muse_format(prompts: PromptFormat) -> PromptFormat:
    """MUSE's prompt format: the chat template for questions, if `prompts` applies one, and plain text for all else.

    MUSE writes its questions and in-context examples itself, so another text format would wrap them twice.
    """

    def write(example: Example) -> RenderedExample:
        rendered = prompts.write(example) if example.kind == "qa" else None
        return rendered if rendered and rendered.has_special_tokens else RenderedExample(*plain(example))

    return replace(prompts, write=write)


def generation_limits(batch_size: int, max_new_tokens: int = VERBATIM_TOKENS) -> GenerationLimits:
    """Where MUSE's generations end; those of continuations by default."""
    return GenerationLimits(batch_size, max_new_tokens, stop_early=False, stop_texts=STOP_TEXTS)


def muse_scores(
    context: ScoringContext,
    rows: MuseRows,
    retain_min_k_auc: float = CHANCE_AUC,
    generations: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Score a model on MUSE.

    Args:
        context: the model, its prompt format (see `muse_format`), and the batch size for generation.
        rows: the rows.
        retain_min_k_auc: `min_k_auc` of a retain-only model, for privacy leakage.
        generations: continuations that were generated with `generation_limits` already, by the example's id.

    Returns:
        The scores, which can be written as JSON:

        - `verbatim_memorisation`: ROUGE-L F1 of continuations of forget texts.
        - `knowledge_memorisation`: ROUGE-L F1 of answers about the forget texts.
        - `utility`: ROUGE-L F1 of answers about the retain texts.
        - `privleak`: privacy leakage in percent; `min_k_auc` is the AUC it is computed from.
        - `extraction_strength` and `exact_memorisation` of the continuations.

    Raises:
        NekoLeanError: an answer has no tokens, or every continuation is a single token.
    """
    context = replace(context, prompts=muse_format(context.prompts))
    verbatim = _encode(context, rows.verbatim)
    limits = generation_limits(context.limits.batch_size)
    continuations = generated_answers(context, verbatim, limits, "continuations", generations)
    forget = _document_logps(context, rows.forget_texts, "forget")
    area = min_k_auc(forget, _document_logps(context, rows.holdout_texts, "holdout"))
    return {
        "verbatim_memorisation": _mean_rouge(reference_answers(context, verbatim), continuations),
        "knowledge_memorisation": _knowledge(context, rows.forget_knowledge, "forget questions"),
        "utility": _knowledge(context, rows.retain_knowledge, "retain questions"),
        "privleak": privleak(area, retain_min_k_auc),
        "min_k_auc": area,
        **memorisation_means(answer_views(context, verbatim, "true continuations")),
    }


def _knowledge(context: ScoringContext, questions: Sequence[Example], label: str) -> float:
    encoded = _encode(context, questions)
    limits = generation_limits(context.limits.batch_size, KNOWLEDGE_TOKENS)
    answers = generated_answers(context, encoded, limits, label)
    return _mean_rouge(reference_answers(context, encoded), answers)


def _encode(context: ScoringContext, examples: Sequence[Example]) -> list[EncodedExample]:
    """Tokenize examples without EOS, because a continuation stops in the middle of a text."""
    return encode(examples, context.tokenizer, context.prompts, sys.maxsize)


def _document_logps(context: ScoringContext, texts: Sequence[str], label: str) -> list[np.ndarray]:
    """Log-probabilities of the tokens of each text, truncated to its first MAX_LENGTH tokens."""
    # MUSE's texts are MAX_LENGTH tokens long without the BOS token.
    prefix = len(encode_texts(context.tokenizer, [""])[0])
    ids, _ = tokenize_documents(context.tokenizer, texts, position_limit(context.lm, MAX_LENGTH + prefix))
    with progress_bar(f"{label} texts", len(ids), "texts", context.quiet) as progress:
        return logp_without_end(view_documents(context.lm, context.tokenizer, ids, progress=progress), label)


def _mean_rouge(references: Sequence[str], generations: Sequence[str]) -> float:
    return float(np.mean([rouge_f1(*texts) for texts in zip(references, generations, strict=True)]))

"""What the benchmarks measure on a model: its view of given answers, and the answers that it generates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from neko_lean.data import EncodedExample
from neko_lean.errors import NekoLeanError
from neko_lean.models import position_limit, refuse_unknown_examples
from neko_lean.scoring.generation import GenerationLimits, generate_on_all_ranks
from neko_lean.scoring.limits import MAX_LENGTH, fit_answer
from neko_lean.scoring.measure import ScoringContext
from neko_lean.scoring.memorisation import exact_memorisation, extraction_strength
from neko_lean.scoring.views import View, view_answers
from neko_lean.terminal import progress_bar


def answer_views(context: ScoringContext, encoded: Sequence[EncodedExample], label: str) -> list[View]:
    """The model's view of each example's answer, including the EOS token if there is one.

    Args:
        context: the model.
        encoded: the tokenized examples.
        label: name of the examples, for the progress bar.

    Raises:
        NekoLeanError: an answer has no tokens, or the model does not have a token id.
    """
    limit = position_limit(context.lm, MAX_LENGTH)
    fitted = [fit_answer(example, limit) for example in encoded]
    empty = next((example.example.id for example in fitted if not example.answer_length), None)
    if empty is not None:
        raise NekoLeanError(f"row {empty}: the answer has no tokens in this tokenizer; remove the row.")
    refuse_unknown_examples(fitted, context.lm)

    with progress_bar(label, len(fitted), "rows", context.quiet) as progress:
        return view_answers(context.lm, context.tokenizer, fitted, progress=progress)


def logp_without_end(views: Sequence[View], label: str) -> list[np.ndarray]:
    """Log-probabilities of each text's tokens except the last, for the min-k attack; see `memorisation_means`.

    Args:
        views: the model's views of the texts.
        label: name of the texts, for the error message.

    Raises:
        NekoLeanError: every text is a single token.
    """
    result = [view.logp[:-1] for view in views if len(view.logp) > 1]
    if not result:
        raise NekoLeanError(f"every {label} text is a single token, which the min-k attack ignores; use longer texts.")
    return result


def memorisation_means(views: Sequence[View]) -> dict[str, float]:
    """Mean extraction strength and exact memorisation of the answers, without each answer's last token.

    OpenUnlearning (arXiv 2506.12618) ignores the last token in these metrics and in min-k, because it is EOS for a
    question. It does so even for a text without EOS. Answers of a single token have no value and are left out.

    Raises:
        NekoLeanError: every answer is a single token.
    """
    ranks = [view.rank[:-1] for view in views if len(view.rank) > 1]
    if not ranks:
        raise NekoLeanError("every answer is a single token; end answers with EOS to measure their memorisation.")
    return {
        "extraction_strength": float(np.mean([extraction_strength(rank) for rank in ranks])),
        "exact_memorisation": float(np.mean([exact_memorisation(rank) for rank in ranks])),
    }


def generated_answers(
    context: ScoringContext,
    encoded: Sequence[EncodedExample],
    limits: GenerationLimits,
    label: str,
    generations: Mapping[str, str] | None = None,
) -> list[str]:
    """The greedy continuation of each example's prompt, without special tokens.

    Args:
        context: the model.
        encoded: the tokenized examples.
        limits: where batches and generations end.
        label: name of the examples, for the progress bar.
        generations: texts that were generated with these limits already, by the example's id.
    """
    texts = dict(generations or {})
    pending = [example for example in encoded if example.example.id not in texts]
    generated = generate_on_all_ranks(
        context.lm,
        context.tokenizer,
        [example.example for example in pending],
        [example.input_ids[: example.prompt_length] for example in pending],
        limits,
        end=context.prompts.end_of_turn,
        label=label,
        quiet=context.quiet,
    )
    texts |= {example.example.id: generation.text for example, generation in zip(pending, generated, strict=True)}
    return [texts[example.example.id].strip() for example in encoded]


def reference_answers(context: ScoringContext, encoded: Sequence[EncodedExample]) -> list[str]:
    """The true answers as the tokenizer decodes them, so that they are spelled like a generation."""

    def decode(ids: Sequence[int]) -> str:
        text = cast(str, context.tokenizer.decode(list(ids), skip_special_tokens=True))
        return context.tokenizer.clean_up_tokenization(text).strip()

    return [decode(example.input_ids[example.prompt_length :]) for example in encoded]

"""Measurements on whole documents: membership inference, and the loss of held-out text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from neko_lean.cache import TeacherCache
from neko_lean.data import Document, Example, encode, read_anchor
from neko_lean.distributed import run_on_main_and_broadcast
from neko_lean.errors import NekoLeanError
from neko_lean.jsonio import strict_json, write_jsonl
from neko_lean.models import position_limit, tokenizer_fingerprint
from neko_lean.scoring import membership
from neko_lean.scoring.limits import MAX_LENGTH
from neko_lean.scoring.measure import ScoringContext
from neko_lean.scoring.membership_attacks import ReferenceLoss, ScoredDocument, attack_scores
from neko_lean.scoring.score_folder import writing
from neko_lean.scoring.views import View, tokenize_documents, view_documents
from neko_lean.terminal import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


DOCUMENTS = "documents.jsonl"
# By text: the tokens that a reference model's loss was computed on, and the loss.
ReferenceLosses = Mapping[str, tuple[Sequence[int], float]]


def held_out_nll(context: ScoringContext, documents: Sequence[Document]) -> float:
    """Mean token loss of held-out documents in nats, each document with the same weight."""
    limit = position_limit(context.lm, MAX_LENGTH)
    with progress_bar("held-out text", len(documents), "documents", context.quiet) as progress:
        ids, truncated = tokenize_documents(context.tokenizer, [document.text for document in documents], limit)
        context.truncated.held = sum(truncated)
        views = view_documents(context.lm, context.tokenizer, ids, progress=progress)
    return sum(float(-view.logp.mean()) for view in views) / len(views)


def reference_losses(
    teacher: TeacherCache,
    nonmembers: Path,
    documents: Sequence[tuple[str, Document]],
    forget: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    limit: int = MAX_LENGTH,
) -> ReferenceLosses:
    """Read the reference model's mean token losses of the membership documents from its teacher cache.

    Args:
        teacher: the reference model's cache.
        nonmembers: the file with the non-members.
        documents: the documents to find, as pairs of side and document.
        forget: the forget rows; the members are their continuations and documents.
        tokenizer: the tokenizer of the scored model.
        limit: maximum number of tokens per document.

    Returns:
        For each text, the tokens and the loss. In the cache, prompt and answer are tokenized separately, so the tokens
        may differ from those of the whole text.

    Raises:
        NekoLeanError: the cache was made with another tokenizer or lacks a document.
    """
    # The reference is deliberately another model, but its losses must be those of the same tokens.
    teacher.check_tokenizer(tokenizer_fingerprint(tokenizer))

    members = [example for example in forget if example.kind != "qa"]
    losses = {}
    for encoded in encode([*members, *read_anchor(nonmembers)], tokenizer, "plain", limit):
        example = encoded.example
        text = example.text
        if teacher.has_target_logp(encoded):
            losses[text] = encoded.input_ids, float(-teacher.target_logp(encoded).mean())

    missing = sum(document.text not in losses for _, document in documents)
    if missing:
        raise NekoLeanError(
            f"the cache of --reference lacks {missing} of the {len(documents)} documents of --mia: create it with "
            f"cache-teacher --forget DATA --anchor MIA/nonmember.jsonl."
        )
    return losses


def measure_membership(
    context: ScoringContext, documents: Sequence[tuple[str, Document]], reference: ReferenceLosses | None
) -> dict[str, Any] | None:
    """Run the membership attacks and write documents.jsonl.

    Args:
        context: the scored model and its work folder.
        documents: pairs of side ("member" or "nonmember") and document.
        reference: `reference_losses`, or None to skip the reference attack.

    Returns:
        The `membership` block of scores.json, or None if there are no documents.
    """
    if not documents:
        return None
    lm, tokenizer = context.lm, context.tokenizer
    texts = [document.text for _, document in documents]

    # The views of all documents.
    ids, truncated = tokenize_documents(tokenizer, texts, position_limit(lm, MAX_LENGTH))
    context.truncated.documents = sum(truncated)
    with progress_bar("membership", len(texts), "documents", context.quiet) as progress:
        views = view_documents(lm, tokenizer, ids, progress=progress)

    # For a truncated document, zlib must compress the text of the same tokens.
    seen_texts = [
        cast(str, tokenizer.decode(tokens)) if is_truncated else text
        for text, tokens, is_truncated in zip(texts, ids, truncated, strict=True)
    ]
    references = [None] * len(texts) if reference is None else _with_reference(context, texts, ids, views, reference)
    scored = [
        attack_scores(ScoredDocument(text, view, losses))
        for text, view, losses in zip(seen_texts, views, references, strict=True)
    ]

    lines = [
        {"side": side, "task": document.task, **scores}
        for (side, document), scores in zip(documents, scored, strict=True)
    ]
    strict_json(lines, DOCUMENTS)  # a reference model's losses may be NaN, too
    run_on_main_and_broadcast(writing(context.stage, lambda: write_jsonl(context.stage / DOCUMENTS, lines)))
    return membership.summary(lines)


def _with_reference(
    context: ScoringContext,
    texts: Sequence[str],
    ids: Sequence[Sequence[int]],
    views: Sequence[View],
    reference: ReferenceLosses,
) -> list[ReferenceLoss]:
    """The losses of both models on the tokens that the reference model's loss is of."""
    other_tokens = {
        text: reference[text][0] for text, tokens in zip(texts, ids, strict=True) if reference[text][0] != tokens
    }
    other_views = view_documents(context.lm, context.tokenizer, list(other_tokens.values()))
    by_text = dict(zip(texts, views, strict=True)) | dict(zip(other_tokens, other_views, strict=True))
    return [ReferenceLoss(reference[text][1], float(-by_text[text].logp.mean())) for text in texts]

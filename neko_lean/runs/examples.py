"""Prepare the examples of an unlearning run: read, encode, add the anchor, substitutes and levels, digest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from neko_lean.cache import TeacherCache, writes_documents
from neko_lean.checkpoints import rows_digest
from neko_lean.data import (
    EncodedExample,
    Example,
    PromptFormat,
    count_lost_answers,
    encode,
    encode_anchor,
    find_format,
    position_warning,
    random_answers,
    refusals,
    similar_answers,
    truncation_summary,
)
from neko_lean.errors import NekoLeanError
from neko_lean.models import tokenizer_fingerprint
from neko_lean.recipe import Recipe, reads_retain, substitutes_retain_answers, uses_levels
from neko_lean.terminal import log_line
from neko_lean.training import TrainingExamples, forget_span, with_levels, with_spread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PreparedExamples:
    """The examples of an unlearning run, encoded and truncated to `max_length` tokens."""

    forget: list[EncodedExample]
    retain: list[EncodedExample]  # including the anchor; empty if the recipe has no retain objective
    anchor: list[EncodedExample]
    substitutes: list[EncodedExample]  # one for each forget example, or none
    max_length: int  # the recipe's, or the number of positions that the model has
    prompts: PromptFormat

    def digests(self) -> dict[str, str]:
        """SHA-256 of each set, for the identity of the run."""
        return {
            "forget rows": rows_digest(self.forget),
            "retain rows": rows_digest(self.retain),
            "anchor": rows_digest(self.anchor),
        }


def prepare_examples(
    forget: Sequence[Example],
    retain: Sequence[Example] | None,
    anchor: Sequence[Example],
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    seed: int,
) -> PreparedExamples:
    """Encode what a run trains on.

    Args:
        forget: the examples to forget.
        retain: the examples to preserve, or None if the model has yet to write them. The recipe's substitutes are then
            left out, if they are taken from them.
        anchor: what the model never saw, as `read_anchor` returns it.
        recipe: decides the prompt format, the substitutes, and whether the retain set is used.
        tokenizer: the model's.
        max_length: tokens that an example is truncated to.
        seed: for random substitutes.

    Raises:
        NekoLeanError: no forget token would get a loss, or the recipe replaces answers and the forget set has none, or
            the model has yet to write a retain set with answers that could replace them.
    """
    prompts = find_format(recipe.format, tokenizer, recipe.system)
    encode_set = partial(
        encode, tokenizer=tokenizer, prompts=prompts, max_length=max_length, append_eos=recipe.append_eos
    )
    # Substitutes replace whole answers, one for each forget example.
    forget_examples = encode_set(forget, windows=recipe.substitute == "none")
    retain_examples = encode_set(retain or [], windows=True)
    anchor_examples = encode_anchor(anchor, tokenizer, prompts, max_length)

    _refuse_nothing_to_forget(forget_examples, recipe)
    if retain is None and recipe.substitute == "similar" and writes_documents(prompts):
        raise NekoLeanError(
            f"recipe {recipe.name} answers forget prompts as similar retain prompts, but without a chat template the "
            f"model would write a retain set of documents, which have none; pass --retain, or choose another recipe, "
            f"such as calibrated."
        )
    substitutes = []
    if not substitutes_retain_answers(recipe) or retain is not None:
        substitutes = _substitutes(forget_examples, retain_examples, recipe, prompts, tokenizer, max_length, seed)
    if warning := position_warning(
        [*forget_examples, *retain_examples, *anchor_examples], max_length, recipe.max_length
    ):
        log_line(warning)

    trained = [*retain_examples, *anchor_examples] if recipe.retain is not None else []
    return PreparedExamples(forget_examples, trained, anchor_examples, substitutes, max_length, prompts)


def training_examples(
    prepared: PreparedExamples,
    recipe: Recipe,
    teacher: TeacherCache | None,
    base_cache: TeacherCache | None,
    tokenizer: PreTrainedTokenizerBase,
) -> TrainingExamples:
    """What the trainer gets: the prepared examples, with levels for an objective that reads them.

    Levels come from the best source there is: the model before it learned the forget set (`base_cache`), unseen
    documents (the anchor) and the teacher's own losses, or the recipe's one level for all tokens.

    Raises CacheError if `base_cache` does not hold the forget set, or was truncated further.
    """
    forget = prepared.forget
    if uses_levels(recipe):
        if base_cache is not None:
            # The weights differ from the student's by design; text must still become the same tokens.
            base_cache.check_tokenizer(tokenizer_fingerprint(tokenizer))
            base_cache.check_format(prepared.prompts.name)
            forget = [replace(example, levels=tuple((-base_cache.target_logp(example)).tolist())) for example in forget]
            anchor = [example for example in prepared.anchor if base_cache.has_target_logp(example)]
            for example in anchor:  # before the run starts
                base_cache.target_logp(example)
            if prepared.anchor and not anchor:
                log_line(
                    f"warning: {base_cache.folder} does not hold the anchor, so the levels do not follow the "
                    f"student's loss on unseen text, and forgotten text can be told apart; make it with "
                    f"cache-teacher --anchor."
                )
        elif prepared.anchor and teacher is not None:
            forget = _estimated_levels(forget, prepared.anchor, recipe, teacher)
        else:
            log_line(
                f"warning: without --anchor or --base-cache, every token counts as forgotten at a loss of "
                f"{recipe.hyperparameters['level']} nats, whatever it is."
            )
    anchor_count = len(prepared.anchor) if prepared.retain else 0
    return TrainingExamples(forget, prepared.retain, prepared.substitutes, anchor_count)


def _estimated_levels(
    forget: list[EncodedExample], anchor: list[EncodedExample], recipe: Recipe, teacher: TeacherCache
) -> list[EncodedExample]:
    """Levels by the teacher's losses on the anchor, and on forget examples of the anchor's kinds if it was cached with
    them."""
    losses = [-teacher.target_logp(example) for example in anchor]
    leveled = with_levels(forget, anchor, losses)
    kinds = {example.example.kind == "qa" for example in anchor}
    compared = [example if (example.example.kind == "qa") in kinds else None for example in forget]
    if not all(example is None or teacher.has_target_logp(example) for example in compared):
        log_line(
            f"warning: {teacher.folder} does not hold the forget set, so all tokens of a text will become about "
            f"equally likely, which min-k attacks recognise; make it with cache-teacher --forget."
        )
        return leveled
    forget_losses = [None if example is None else -teacher.target_logp(example) for example in compared]
    return with_spread(leveled, [forget_span(example, recipe) for example in forget], forget_losses, anchor, losses)


def report_truncation(prepared: PreparedExamples, recipe: Recipe, quiet: bool) -> int:
    """Log how many examples are truncated; returns the number of forget examples that lost their whole answer."""
    if not reads_retain(recipe):
        log_line(f"retain: not used, because recipe {recipe.name} has no retain objective", quiet)
    for name, examples in (("forget", prepared.forget), ("retain", prepared.retain)):
        if summary := truncation_summary(examples, prepared.max_length):
            # Shown even with --quiet if a forget row is truncated: the tokens that are lost are not forgotten.
            is_warning = name == "forget" and any(example.num_truncated for example in examples)
            prefix = "warning: " if is_warning else ""
            log_line(f"{prefix}{name}: {summary}", quiet and not is_warning)

    lost = count_lost_answers(prepared.forget)
    if lost:
        # Shown even with --quiet: part of the forget set will not be forgotten.
        log_line(
            f"warning: {lost} of {len(prepared.forget)} forget rows get no forget loss, because truncation to "
            f"{prepared.max_length} tokens removes their whole answer."
        )
    return lost


def _refuse_nothing_to_forget(forget: Sequence[EncodedExample], recipe: Recipe) -> None:
    """Raise NekoLeanError if no forget token would get a loss and no substitute replaces the answers."""
    spans = [forget_span(example, recipe) for example in forget]
    if recipe.substitute == "none" and not any(start < stop for start, stop in spans):
        raise NekoLeanError(
            f"recipe {recipe.name} would forget nothing: with max_length {recipe.max_length} and answer_skip "
            f"{recipe.answer_skip}, no token of the {len(forget)} forget rows gets a loss; raise max_length or lower "
            f"answer_skip."
        )


def _substitutes(
    forget: Sequence[EncodedExample],
    retain: Sequence[EncodedExample],
    recipe: Recipe,
    prompts: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    seed: int,
) -> list[EncodedExample]:
    """The recipe's replacement for each forget answer."""
    if recipe.substitute == "none":
        return []
    forget_texts = [encoded.example for encoded in forget]
    documents = sum(example.kind == "document" for example in forget_texts)
    if documents:
        raise NekoLeanError(
            f"recipe {recipe.name} replaces answers, but {documents} of {len(forget_texts)} forget rows are documents, "
            f"which have no prompt to answer; choose another recipe, such as calibrated."
        )
    if recipe.substitute == "refusal":
        replaced = refusals(forget_texts)
    elif recipe.substitute == "similar":
        replaced = similar_answers(forget, retain)
    else:
        replaced = random_answers(forget_texts, [encoded.example for encoded in retain], seed)
    return encode(replaced, tokenizer, prompts, max_length)

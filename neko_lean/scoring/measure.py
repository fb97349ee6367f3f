"""Measurements on the scored examples: a generation each, and the model's view of the true answer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neko_lean.data import EncodedExample, Example, PromptFormat, encode, encode_prompts, truncation_summary
from neko_lean.distributed import (
    as_single_process,
    items_of_rank,
    merge_items_of_ranks,
    raise_on_any_rank,
    rank,
    run_on_main_and_broadcast,
)
from neko_lean.models import CausalLM, position_limit, refuse_unknown_examples
from neko_lean.scoring.generation import (
    Generation,
    GenerationLimits,
    examples_of_rank,
    generate,
    generation_warnings,
    method_line,
)
from neko_lean.scoring.limits import MAX_LENGTH, TruncationCounts, fit_answer
from neko_lean.scoring.memorisation import answer_numbers, truth_ratio
from neko_lean.scoring.outputs import leak_numbers, output_numbers
from neko_lean.scoring.paraphrases import Paraphrase
from neko_lean.scoring.score_folder import add_generations, read_generations, writing
from neko_lean.scoring.task import example_score, score_name, unicode_score
from neko_lean.scoring.views import view_answers
from neko_lean.terminal import log_line, progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ScoringContext:
    """The model being scored, and what every measurement shares.

    Attributes:
        lm: the model.
        tokenizer: its tokenizer.
        prompts: the prompt format.
        stage: the score's work folder.
        limits: where batches and generations end.
        truncated: counts of what was truncated; the measurements fill it in.
        quiet: whether to hide progress.
    """

    lm: CausalLM
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptFormat
    stage: Path
    limits: GenerationLimits
    truncated: TruncationCounts
    quiet: bool


def generate_answers(context: ScoringContext, examples: Sequence[Example]) -> list[Generation]:
    """Generate an answer to each example, except those that an interrupted run has already written to the stage.

    The batches are divided among the ranks; the progress bar counts those of the main process.
    """
    lm, tokenizer, stage = context.lm, context.tokenizer, context.stage
    prompts = encode_prompts(examples, tokenizer, context.prompts)

    # What is left to do, and which part of it is this rank's.
    finished: dict[int, dict[str, Any]] = dict(
        run_on_main_and_broadcast(
            writing(stage, lambda: [(i, asdict(generation)) for i, generation in read_generations(stage).items()])
        )
    )
    pending = [i for i in range(len(examples)) if i not in finished]
    pending_examples, pending_prompts = [examples[i] for i in pending], [prompts[i] for i in pending]
    own = [pending[i] for i in examples_of_rank(lm, tokenizer, pending_examples, context.limits, pending_prompts)]

    # What the user should know before it starts.
    if finished:
        log_line(f"score: {len(finished)} of {len(examples)} rows were generated already", context.quiet)
    for warning in generation_warnings(lm, prompts, context.limits.max_new_tokens, context.truncated):
        log_line(warning)
    line = method_line(lm, tokenizer) if pending else None
    if line is not None:
        log_line(f"score: {line}", context.quiet)

    def generate_own() -> list[tuple[int, dict[str, Any]]]:
        generated = []
        with progress_bar("score", len(finished) + len(own), "rows", context.quiet) as progress:
            progress.advance(len(finished))
            own_prompts = [prompts[i] for i in own]
            own_examples = [examples[i] for i in own]
            for batch in generate(
                lm,
                tokenizer,
                own_examples,
                **asdict(context.limits),
                prompts=own_prompts,
                end=context.prompts.end_of_turn,
            ):
                numbered = [(own[i], generation) for i, generation in batch]
                add_generations(stage, numbered)
                generated += [(i, asdict(generation)) for i, generation in numbered]
                progress.advance(len(batch))
        return generated

    for generated in raise_on_any_rank(writing(stage, generate_own)):
        finished |= dict(generated)
    return [Generation(**finished[i]) for i in range(len(examples))]


def example_numbers(
    context: ScoringContext,
    examples: Sequence[Example],
    generations: Sequence[Generation],
    paraphrases: Sequence[Paraphrase],
) -> list[dict[str, float]]:
    """Every number of each example except its score, by name; a number that cannot be measured is absent."""
    lm, tokenizer = context.lm, context.tokenizer
    encoded = encode_answers(lm, tokenizer, examples, context.prompts)
    answered = [example for example in encoded if example.answer_length]
    _warn_of_truncated_answers(context, encoded, len(encoded) - len(answered))
    refuse_unknown_examples(encoded, lm)

    # The model's view of the true answers.
    with progress_bar("answers", len(answered), "rows", context.quiet) as progress:
        views = view_answers(lm, tokenizer, answered, progress=progress)
    answers = {example.example: view for example, view in zip(answered, views, strict=True)}
    ratios = _truth_ratios(context, examples, paraphrases)

    # All numbers, by example.
    numbers = []
    for example, generation in zip(examples, generations, strict=True):
        window = generation.window
        of_text = {**leak_numbers(example, window), **output_numbers(example, window)}
        of_answer = answer_numbers(answers[example]) if example in answers else {}
        numbers.append({**of_text, **ratios.get(example.id, {}), **of_answer})
    return numbers


def _warn_of_truncated_answers(context: ScoringContext, encoded: Sequence[EncodedExample], empty: int) -> None:
    truncated = context.truncated
    truncated.answers, truncated.empty_answers = sum(example.num_truncated > 0 for example in encoded), empty
    if truncated.answers:
        limit = position_limit(context.lm, MAX_LENGTH)
        log_line(f"warning: answers are measured within the length limit: {truncation_summary(encoded, limit)}")
    if empty:
        log_line(f"warning: {empty} of {len(encoded)} rows have an answer without tokens, which is not measured.")


def encode_answers(
    lm: CausalLM, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], prompts: PromptFormat
) -> list[EncodedExample]:
    """Tokenize prompts and answers, truncated by `fit_answer`."""
    limit = position_limit(lm, MAX_LENGTH)
    return [fit_answer(example, limit) for example in encode(examples, tokenizer, prompts, sys.maxsize)]


def _truth_ratios(
    context: ScoringContext, examples: Sequence[Example], paraphrases: Sequence[Paraphrase]
) -> dict[str, dict[str, float]]:
    """The truth ratio of each example that has a paraphrased answer and wrong answers, by the example's id."""
    lm, tokenizer = context.lm, context.tokenizer

    # The paraphrase and the wrong answers as examples; the paraphrase is the first.
    by_id = {example.id: example for example in examples}
    encoded = [
        (
            paraphrase.id,
            encode_answers(
                lm,
                tokenizer,
                [replace(by_id[paraphrase.id], output=text) for text in (paraphrase.output, *paraphrase.wrong)],
                context.prompts,
            ),
        )
        for paraphrase in paraphrases
        if paraphrase.output is not None
    ]
    measurable = [(name, answers) for name, answers in encoded if all(answer.answer_length for answer in answers)]
    count = sum(any(answer.num_truncated or not answer.answer_length for answer in answers) for _, answers in encoded)
    context.truncated.paraphrases = count
    if count:
        log_line(
            f"warning: {count} of {len(encoded)} paraphrases are truncated to the length limit, or have an answer "
            f"without tokens, which is not measured."
        )

    def ratio(answers: Sequence[EncodedExample]) -> float:
        with as_single_process():  # too few texts to divide among the ranks
            right, *wrong = view_answers(lm, tokenizer, answers)
        return truth_ratio(right, wrong)

    # Each rank computes its share; an example's ratios are averaged.
    own = raise_on_any_rank(lambda: [ratio(answers) for _, answers in items_of_rank(measurable)])[rank()]
    ratios: dict[str, list[float]] = {}
    for (name, _), value in zip(measurable, merge_items_of_ranks(own), strict=True):
        ratios.setdefault(name, []).append(value)
    return {name: {"truth_ratio": sum(values) / len(values)} for name, values in ratios.items()}


def generation_line(split: str, example: Example, generation: Generation, numbers: dict[str, float]) -> dict[str, Any]:
    """One line of generations.jsonl."""
    return {
        "split": split,
        "id": example.id,
        "task": example.task,
        "kind": score_name(example),
        "example_kind": example.kind,
        "document": example.document,
        "score": example_score(example, generation.text),
        "unicode_score": unicode_score(example, generation.text),
        "input": example.input,
        "output": example.output,
        "generation": generation.text,
        "window": generation.window,
        "ended": generation.ended,
        "numbers": numbers,
    }

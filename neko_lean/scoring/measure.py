"""What is measured of a model: one generation a row, one forward pass a document."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from neko_lean.cache import TeacherCache
from neko_lean.data import Document, EncodedExample, Example, encode, read_anchor, truncation_summary
from neko_lean.distributed import (
    as_single_process,
    items_of_rank,
    merge_items_of_ranks,
    raise_on_any_rank,
    rank,
    run_on_main_and_broadcast,
)
from neko_lean.errors import NekoLeanError
from neko_lean.jsonio import strict_json, write_jsonl
from neko_lean.models import CausalLM, position_limit, refuse_unknown_examples, tokenizer_fingerprint
from neko_lean.scoring import membership
from neko_lean.scoring.generation import Decoding, Generation, generate, generation_warnings, method_line, own_rows
from neko_lean.scoring.limits import MAX_LENGTH, Cut, fitted_answer
from neko_lean.scoring.memorisation import answer_numbers, truth_ratio
from neko_lean.scoring.outputs import leak_numbers, output_numbers
from neko_lean.scoring.paraphrases import Paraphrase
from neko_lean.scoring.score_folder import add_generations, read_generations, writing
from neko_lean.scoring.task import KINDS, row_score, unicode_score
from neko_lean.scoring.views import tokenised, view_documents
from neko_lean.terminal import log_line, progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


DOCUMENTS = "documents.jsonl"


def generations(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    stage: Path,
    decoding: Decoding,
    cut: Cut,
    quiet: bool,
) -> list[Generation]:
    """What the model says to each row; what an earlier run left in `stage` is not said again. The ranks share the rows
    out; the bar counts the first one's. `cut` gets the counts of prompts and generations that are cut."""
    known = dict(
        run_on_main_and_broadcast(
            writing(stage, lambda: [(i, asdict(one)) for i, one in read_generations(stage).items()])
        )
    )
    left = [i for i in range(len(rows)) if i not in known]
    own = [left[i] for i in own_rows(lm, tokenizer, [rows[i] for i in left], decoding)]
    if known:
        log_line(f"score: {len(known)} of {len(rows)} rows were generated already", quiet)
    for warning in generation_warnings(lm, tokenizer, rows, decoding.max_new_tokens, cut):
        log_line(warning)
    line = method_line(lm, tokenizer) if left else None
    if line is not None:
        log_line(f"score: {line}", quiet)

    def speak() -> list[tuple[int, dict[str, Any]]]:
        said = []
        with progress_bar("score", len(known) + len(own), "rows", quiet) as progress:
            progress.advance(len(known))
            wanted = [rows[i] for i in own]
            for batch in generate(lm, tokenizer, wanted, **asdict(decoding)):
                numbered = [(own[i], one) for i, one in batch]
                add_generations(stage, numbered)
                said += [(i, asdict(one)) for i, one in numbered]
                progress.advance(len(batch))
        return said

    for part in raise_on_any_rank(writing(stage, speak)):
        known |= dict(part)
    return [Generation(**known[i]) for i in range(len(rows))]


def row_numbers(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    said: Sequence[Generation],
    others: Sequence[Paraphrase],
    cut: Cut,
    quiet: bool,
) -> list[dict[str, float]]:
    """Everything that is measured of a row but its score, by name. `cut` gets the counts of answers that are cut."""
    encoded = encoded_answers(lm, tokenizer, rows)
    answered = [one for one in encoded if one.answer_length]
    cut.answers, cut.empty_answers = sum(one.num_truncated > 0 for one in encoded), len(encoded) - len(answered)
    if cut.answers:
        limit = position_limit(lm, MAX_LENGTH)
        log_line(f"warning: answers are measured within the length limit: {truncation_summary(encoded, limit)}")
    if cut.empty_answers:
        log_line(f"warning: {cut.empty_answers} of {len(rows)} rows have an answer of no tokens: it is not measured.")
    refuse_unknown_examples(encoded, lm)

    with progress_bar("answers", len(answered), "rows", quiet) as progress:
        views = view_documents(lm, tokenizer, [one.input_ids for one in answered], progress=progress)
    answers = {one.example: view.after(one.prompt_length) for one, view in zip(answered, views, strict=True)}
    ratios = _truth_ratios(lm, tokenizer, rows, others, cut)

    found = []
    for row, one in zip(rows, said, strict=True):
        numbers = {**leak_numbers(row, one.window), **output_numbers(row, one.window), **ratios.get(row.id, {})}
        found.append({**numbers, **(answer_numbers(answers[row]) if row in answers else {})})
    return found


def encoded_answers(lm: CausalLM, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example]) -> list[EncodedExample]:
    """The rows' prompts and answers as tokens, cut by `fitted_answer`."""
    limit = position_limit(lm, MAX_LENGTH)
    return [fitted_answer(one, limit) for one in encode(rows, tokenizer, "plain", sys.maxsize)]


def _truth_ratios(
    lm: CausalLM, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], others: Sequence[Paraphrase], cut: Cut
) -> dict[str, dict[str, float]]:
    """The truth ratio of each row of which another wording of the answer and wrong answers were given, by id."""
    known = {row.id: row for row in rows}
    texts = [(one.id, (one.output, *one.wrong)) for one in others if one.output is not None]
    encoded = [
        (name, encoded_answers(lm, tokenizer, [replace(known[name], output=text) for text in answers]))
        for name, answers in texts
    ]
    answered = [(name, answers) for name, answers in encoded if all(one.answer_length for one in answers)]
    cut.paraphrases = sum(any(one.num_truncated or not one.answer_length for one in answers) for _, answers in encoded)
    if cut.paraphrases:
        log_line(
            f"warning: {cut.paraphrases} of {len(encoded)} other wordings are cut to the length limit, or have an "
            f"answer of no tokens and are not measured."
        )

    def ratio(answers: Sequence[EncodedExample]) -> float:
        with as_single_process():  # so few texts are one process's work
            views = view_documents(lm, tokenizer, [one.input_ids for one in answers])
        right, *wrong = (view.after(one.prompt_length) for view, one in zip(views, answers, strict=True))
        return truth_ratio(right, wrong)

    own = raise_on_any_rank(lambda: [ratio(answers) for _, answers in items_of_rank(answered)])[rank()]
    found: dict[str, list[float]] = {}
    for (name, _), value in zip(answered, merge_items_of_ranks(own), strict=True):
        found.setdefault(name, []).append(value)
    return {name: {"truth_ratio": sum(values) / len(values)} for name, values in found.items()}


def line_of(split: str, row: Example, said: Generation, numbers: dict[str, float]) -> dict[str, Any]:
    """One line of generations.jsonl."""
    line = {"split": split, "id": row.id, "task": row.task, "kind": KINDS[row.kind], "score": row_score(row, said.text)}
    line["unicode_score"] = unicode_score(row, said.text)
    line |= {"input": row.input, "output": row.output, "generation": said.text, "window": said.window}
    return {**line, "ended": said.ended, "numbers": numbers}


def held_out_nll(
    lm: CausalLM, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], cut: Cut, quiet: bool
) -> float:
    """Mean token loss of some documents, each counting alike. `cut` gets the count of documents that are cut."""
    with progress_bar("held-out text", len(documents), "documents", quiet) as progress:
        ids, lost = tokenised(tokenizer, [one.text for one in documents], position_limit(lm, MAX_LENGTH))
        cut.held = sum(lost)
        views = view_documents(lm, tokenizer, ids, progress=progress)
    return sum(float(-view.logp.mean()) for view in views) / len(views)


def reference_losses(
    teacher: TeacherCache,
    mia: str | Path,
    documents: Sequence[tuple[str, Document]],
    rows: Sequence[tuple[str, Example]],
    tokenizer: PreTrainedTokenizerBase,
    limit: int = MAX_LENGTH,
) -> dict[str, tuple[list[int], float]]:
    """The reference model's mean token loss of the documents of `mia`, by text, with the tokens it is of, at most
    `limit`: a row's prompt ends in a token of its own. Raises NekoLeanError where the cache lacks some document."""
    # The reference is another model on purpose, but its losses are of this one's tokens.
    teacher.check_tokenizer(tokenizer_fingerprint(tokenizer))

    forgotten = [row for name, row in rows if name == "forget" and row.kind == "sc"]
    outside = read_anchor(Path(mia) / "nonmember.jsonl")
    found = {}
    for one in encode([*forgotten, *outside], tokenizer, "plain", limit):
        text = f"{one.example.input} {one.example.output}" if one.example.input else one.example.output
        if teacher.has_target_logp(one):
            found[text] = one.input_ids, float(-teacher.target_logp(one).mean())

    missing = sum(one.text not in found for _, one in documents)
    if missing:
        raise NekoLeanError(
            f"the cache of --reference lacks {missing} of the {len(documents)} documents of --mia: make it with "
            f"cache-teacher --forget DATA --anchor MIA/nonmember.jsonl."
        )
    return found


def membership_attacks(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[tuple[str, Document]],
    reference: Mapping[str, tuple[list[int], float]] | None,
    stage: Path,
    cut: Cut,
    quiet: bool,
) -> dict[str, Any] | None:
    """The attacks on all documents, and on those of each task that both sides name; writes documents.jsonl.
    `reference` is `reference_losses`, None where that attack was not asked for. `cut` gets the count of documents that
    are cut."""
    if not documents:
        return None
    texts = [one.text for _, one in documents]
    ids, lost = tokenised(tokenizer, texts, position_limit(lm, MAX_LENGTH))
    cut.documents = sum(lost)
    with progress_bar("membership", len(texts), "documents", quiet) as progress:
        views = view_documents(lm, tokenizer, ids, progress=progress)
    # Of a document that is cut, zlib compares the loss with the bytes of the same tokens.
    read = [cast(str, tokenizer.decode(own)) if loses else text
            for text, own, loses in zip(texts, ids, lost, strict=True)]  # fmt: skip
    numbers = [membership.attack_numbers(text, view) for text, view in zip(read, views, strict=True)]
    if reference is not None:
        apart = {text: reference[text][0] for text, own in zip(texts, ids, strict=True) if reference[text][0] != own}
        again = dict(zip(apart, view_documents(lm, tokenizer, list(apart.values())), strict=True))
        for text, found in zip(texts, numbers, strict=True):
            loss = float(-again[text].logp.mean()) if text in again else found["loss"]
            found["reference"] = loss - reference[text][1]
    lines = [{"side": side, "task": one.task, **found} for (side, one), found in zip(documents, numbers, strict=True)]
    strict_json(lines, DOCUMENTS)  # a reference model's losses, too, may be NaN
    run_on_main_and_broadcast(writing(stage, lambda: write_jsonl(stage / DOCUMENTS, lines)))
    return membership.summary(lines)

"""What is measured of a model: one generation a row, one forward pass a document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neko_lean.cache import TeacherCache
from neko_lean.collective import agreed, by_first, whole
from neko_lean.data import Row, encode, truncation_line, write_jsonl
from neko_lean.documents import Document, read_anchor
from neko_lean.errors import NekoLeanError
from neko_lean.finite import strict_json
from neko_lean.identity import tokenizer_fingerprint
from neko_lean.modeling import CausalLM, position_limit
from neko_lean.progress import bar, say
from neko_lean.ranks import alone, rank, share
from neko_lean.scoring import membership
from neko_lean.scoring.generation import Generation, generate, generation_warnings, method_line, own_rows
from neko_lean.scoring.memorisation import answer_numbers, truth_ratio
from neko_lean.scoring.outputs import leak_numbers, output_numbers
from neko_lean.scoring.paraphrases import Paraphrase
from neko_lean.scoring.task import KINDS, row_score, unicode_score
from neko_lean.scoring.unfinished import add_generations, read_generations, writing
from neko_lean.scoring.views import MAX_LENGTH, tokenised, view_documents
from neko_lean.vocabulary import refuse_unknown_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENTS = "documents.jsonl"


def generations(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    stage: Path,
    batch_size: int,
    max_new_tokens: int,
    quiet: bool,
) -> list[Generation]:
    """What the model says to each row; what an earlier run left in `stage` is not said again. The ranks share the rows
    out; the bar counts the first one's."""
    known = dict(by_first(writing(stage, lambda: [(i, asdict(one)) for i, one in read_generations(stage).items()])))
    left = [i for i in range(len(rows)) if i not in known]
    own = [left[i] for i in own_rows(tokenizer, [rows[i] for i in left], batch_size)]
    if known:
        say(f"score: {len(known)} of {len(rows)} rows were generated already", quiet)
    for warning in generation_warnings(lm, tokenizer, rows, max_new_tokens):
        say(warning)
    line = method_line(lm, tokenizer) if left else None
    if line is not None:
        say(f"score: {line}", quiet)

    def speak() -> list[tuple[int, dict[str, Any]]]:
        said = []
        with bar("score", len(known) + len(own), "rows", quiet) as progress:
            progress.advance(len(known))
            wanted = [rows[i] for i in own]
            for batch in generate(lm, tokenizer, wanted, batch_size=batch_size, max_new_tokens=max_new_tokens):
                numbered = [(own[i], one) for i, one in batch]
                add_generations(stage, numbered)
                said += [(i, asdict(one)) for i, one in numbered]
                progress.advance(len(batch))
        return said

    for part in agreed(writing(stage, speak)):
        known |= dict(part)
    return [Generation(**known[i]) for i in range(len(rows))]


def row_numbers(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    said: Sequence[Generation],
    others: Sequence[Paraphrase],
    quiet: bool,
) -> list[dict[str, float]]:
    """Everything that is measured of a row but its score, by name."""
    limit = position_limit(lm, MAX_LENGTH)
    encoded = encode(rows, tokenizer, "plain", limit)
    if any(one.cut for one in encoded):
        say(f"warning: answers are measured within the length limit: {truncation_line(encoded, limit)}")
    refuse_unknown_rows(encoded, lm)
    answered = [one for one in encoded if one.answer]
    with bar("answers", len(answered), "rows", quiet) as progress:
        views = view_documents(lm, tokenizer, [one.ids for one in answered], progress=progress)
    answers = {one.row: view.after(one.prompt) for one, view in zip(answered, views, strict=True)}
    ratios = _truth_ratios(lm, tokenizer, rows, others)
    found = []
    for row, one in zip(rows, said, strict=True):
        numbers = {**leak_numbers(row, one.window), **output_numbers(row, one.window), **ratios.get(row.id, {})}
        found.append({**numbers, **(answer_numbers(answers[row]) if row in answers else {})})
    return found


def _truth_ratios(
    lm: CausalLM, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], others: Sequence[Paraphrase]
) -> dict[str, dict[str, float]]:
    """The truth ratio of each row of which another wording of the answer and wrong answers were given, by id."""
    known, limit = {row.id: row for row in rows}, position_limit(lm, MAX_LENGTH)
    answered = [(one.id, (one.output, *one.wrong)) for one in others if one.output is not None]

    def ratio(name: str, answers: Sequence[str]) -> float:
        row = known[name]
        encoded = encode([replace(row, output=text) for text in answers], tokenizer, "plain", limit)
        with alone():  # so few texts are one batch
            views = view_documents(lm, tokenizer, [one.ids for one in encoded])
        right, *wrong = (view.after(one.prompt) for view, one in zip(views, encoded, strict=True))
        return truth_ratio(right, wrong)

    own = agreed(lambda: [ratio(*one) for one in share(answered)])[rank()]
    found: dict[str, list[float]] = {}
    for (name, _), value in zip(answered, whole(own), strict=True):
        found.setdefault(name, []).append(value)
    return {name: {"truth_ratio": sum(values) / len(values)} for name, values in found.items()}


def line_of(split: str, row: Row, said: Generation, numbers: dict[str, float]) -> dict[str, Any]:
    """One line of generations.jsonl."""
    line = {"split": split, "id": row.id, "task": row.task, "kind": KINDS[row.kind], "score": row_score(row, said.text)}
    line["unicode_score"] = unicode_score(row, said.text)
    line |= {"input": row.input, "output": row.output, "generation": said.text, "window": said.window}
    return {**line, "ended": said.ended, "numbers": numbers}


def held_out_nll(lm: CausalLM, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], quiet: bool) -> float:
    """Mean token loss of some documents, each counting alike."""
    with bar("held-out text", len(documents), "documents", quiet) as progress:
        ids = tokenised(tokenizer, [one.text for one in documents], position_limit(lm, MAX_LENGTH))
        views = view_documents(lm, tokenizer, ids, progress=progress)
    return sum(float(-view.logp.mean()) for view in views) / len(views)


def reference_losses(
    cache: str | Path | None,
    mia: str | Path | None,
    rows: Sequence[tuple[str, Row]],
    tokenizer: PreTrainedTokenizerBase,
    limit: int = MAX_LENGTH,
) -> dict[str, tuple[list[int], float]]:
    """The reference model's mean token loss of the documents of `mia` that are in its cache, by text, with the tokens
    it is of, at most `limit`: a row's prompt ends in a token of its own."""
    if cache is None or mia is None:
        return {}
    teacher = TeacherCache(cache)
    # The reference is another model on purpose, but its losses are of this one's tokens.
    reference = replace(teacher.teacher, tokenizer=tokenizer_fingerprint(tokenizer))
    teacher.check(reference, style=teacher.manifest.format, max_length=limit, encoded=[])
    forgotten = [row for name, row in rows if name == "forget" and row.kind == "sc"]
    outside = read_anchor(Path(mia) / "nonmember.jsonl")
    found = {}
    for one in encode([*forgotten, *outside], tokenizer, "plain", limit):
        text = f"{one.row.input} {one.row.output}" if one.row.input else one.row.output
        if teacher.has_target_logp(one):
            found[text] = one.ids, float(-teacher.target_logp(one).mean())
    return found


def membership_attacks(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[tuple[str, Document]],
    reference: Mapping[str, tuple[list[int], float]] | None,
    stage: Path,
    quiet: bool,
) -> dict[str, Any] | None:
    """The attacks on all documents, and on those of each task that both sides name; writes documents.jsonl.
    `reference` is `reference_losses`, None where that attack was not asked for."""
    if not documents:
        return None
    texts = [one.text for _, one in documents]
    missing = 0 if reference is None else sum(text not in reference for text in texts)
    if missing:
        raise NekoLeanError(
            f"the cache of --reference lacks {missing} of the {len(texts)} documents of --mia: make it with "
            f"cache-teacher --forget DATA --anchor MIA/nonmember.jsonl."
        )
    ids = tokenised(tokenizer, texts, position_limit(lm, MAX_LENGTH))
    with bar("membership", len(texts), "documents", quiet) as progress:
        views = view_documents(lm, tokenizer, ids, progress=progress)
    numbers = [membership.attack_numbers(text, view) for text, view in zip(texts, views, strict=True)]
    if reference is not None:
        apart = {text: reference[text][0] for text, own in zip(texts, ids, strict=True) if reference[text][0] != own}
        again = dict(zip(apart, view_documents(lm, tokenizer, list(apart.values())), strict=True))
        for text, found in zip(texts, numbers, strict=True):
            loss = float(-again[text].logp.mean()) if text in again else found["loss"]
            found["reference"] = loss - reference[text][1]
    lines = [{"side": side, "task": one.task, **found} for (side, one), found in zip(documents, numbers, strict=True)]
    strict_json(lines, DOCUMENTS)  # a reference model's losses, too, may be NaN
    by_first(writing(stage, lambda: write_jsonl(stage / DOCUMENTS, lines)))
    return membership.summary(lines)

"""The report's tables on forgetting and retention: headline numbers, the cells, and what exact match misses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from neko_lean.data.rows import DEFAULT_GROUP
from neko_lean.reporting.figures import QUESTIONS_AXIS, TEXTS_AXIS, Model
from neko_lean.reporting.table import (
    SMALL_PRINT,
    Cell,
    Group,
    Line,
    Table,
    change_note,
    make_line,
    make_table,
    number_column,
)
from neko_lean.reporting.values import NOT_MEASURED, format_interval, format_number, objects, text
from neko_lean.scoring import CELLS, SPLITS, difference_key, interval, number, shown_cells, strongest_attack
from neko_lean.scoring.names import cell_content, cell_name, cell_noun

# Key in scores.json, name, and meaning of each line.
LineSpec = tuple[str, str, str]
MEMORISATION_LINES: tuple[LineSpec, ...] = (
    ("exact_memorisation", "exact memorisation", "share of answer tokens that are the most likely ones"),
    ("extraction_strength", "extraction strength", "share of the answer that is generated once the rest is given"),
    ("answer_probability", "answer probability", "mean probability of the true answer, normalized by length"),
    ("truth_ratio", "truth ratio", "probability of wrong answers relative to a paraphrase of the true one"),
    ("answer_rank", "answer rank", "of an answer's least expected token; geometric mean over questions"),
)
LEAK_LINES: tuple[LineSpec, ...] = (
    ("contained", "contained", "share of answers that occur in the first 64 tokens as whole words"),
    ("alphanumeric", "letters and digits", "the same, comparing only letters and digits"),
    ("digits", "digits", "the same, comparing only digits, for answers with at least four"),
    ("within_ten", "within ten", "share of answers whose every token is among the ten most likely"),
)
OUTPUT_LINES: tuple[LineSpec, ...] = (
    ("repetition", "repetition", "share of four-word sequences that are repeats"),
    ("degenerate_text", "degenerate outputs", "share of outputs that are empty, unreadable, loops or fragments"),
    ("entropy", "entropy", "nats per token, along the true answer"),
    ("rouge_f1", "ROUGE-L F1", "like the task's recall, but lower for longer outputs"),
    ("length_ratio", "length", "of the output relative to the true answer"),
)
GROUP_LINES: tuple[LineSpec, ...] = (
    ("rows", "rows", ""),
    ("rouge_l_recall", "ROUGE-L recall, any script", "how much of the true answer the output has"),
    ("rouge_l_f1", "ROUGE-L F1", "like recall, but lower for longer outputs"),
    ("exact_match", "exact match", "share of answers given to the letter"),
    ("normalised_match", "normalised match", "the same without case, punctuation and articles, in any script"),
    ("answer_probability", "answer probability", "mean probability of the true answer, normalized by length"),
    ("extraction_strength", "extraction strength", "share of the answer that is generated once the rest is given"),
)
KIND_NAMES = {"qa": "questions", "completion": "completions", "document": "documents"}


def headline(models: Sequence[Model]) -> Table | None:
    """The headline numbers; None if no model has any."""
    floor = max((number(model.scores, "mmlu", "award_floor") or 0.0 for model in models), default=0.0)
    aggregate = make_line(models, *_aggregate_line(models))
    membership = "1 if the loss does not tell forgotten documents from unseen ones" + _perfect_model(models)
    auc = "AUC; 0.5: indistinguishable, 1: remembered, 0: conspicuously avoided; the interval allows for all attacks"
    mmlu = "accuracy on multiple-choice questions" + (f"; the shared task's floor was {floor:g}" if floor else "")
    final = "mean of task aggregate, membership score and MMLU"
    lines = [
        aggregate,
        make_line(models, "Membership score", membership, number_column("membership", "score")),
        make_line(models, "Strongest membership attack", auc, _strongest_attack_cell),
        make_line(models, "MMLU", mmlu, number_column("mmlu", "micro")),
        make_line(models, "Final", final, number_column("final")),
    ]
    return make_table("Headline numbers", f"All numbers are 0 to 1. {SMALL_PRINT}", [Group("", lines)])


def _aggregate_line(models: Sequence[Model]) -> tuple[str, str, Callable[[Model], Cell]]:
    """Name, note and cell of the aggregate: LUME's, or that of the groups that were scored."""
    note = "numbers under Forgetting and retention, those of the forget set as 1\u00a0−\u00a0x; one zero makes it zero"  # noqa: RUF001
    if _has_lume_cells(models):
        return "Task aggregate", f"harmonic mean of the twelve {note}", number_column("task_aggregate")
    return "Aggregate", f"harmonic mean of the {note}", number_column("aggregate")


def _has_lume_cells(models: Sequence[Model]) -> bool:
    return shown_cells([model.scores for model in models]) == list(CELLS)


def _strongest_attack_cell(model: Model) -> Cell:
    """The AUC of the strongest attack, which attack it is, its interval, and the change from before."""
    test = strongest_attack(model.scores)
    if test is None:
        return Cell(NOT_MEASURED, missing=True)
    small = [test.label, format_interval(test.interval), change_note(model, test.key)]
    return Cell(format_number(test.value), [line for line in small if line])


def _perfect_model(models: Sequence[Model]) -> str:
    """What a perfect model's membership score would be, from the first scores that have it."""
    for model in models:
        average = number(model.scores, "membership", "perfect_score_mean")
        low = number(model.scores, "membership", "perfect_score_5th_percentile")
        if average is not None and low is not None:
            return (
                f"; a perfect model averages {format_number(average)} here, and is above {format_number(low)} in "
                f"95 % of cases"
            )
    return ""


def cells(models: Sequence[Model]) -> Table | None:
    """The cells, and those for any script that differ from them; None if no model has any."""
    groups = []
    names = shown_cells([model.scores for model in models])
    for split, note in zip(SPLITS, ("lower is forgotten", "higher is kept"), strict=True):
        lines = [
            make_line(models, cell_content(cell), _measure(cell), _cell_column("cells", cell))
            for cell in names
            if cell.startswith(f"{split}.")
        ]
        if lines:
            groups.append(Group(f"{split.capitalize()} set: {note}", lines))
    if all(line.is_empty for group in groups for line in group.lines):
        return None

    if differing := _differing_cells(models):
        note = "including text that the task's own scores, which only know English letters, do not see"
        lines = [make_line(models, cell_name(cell), note, _cell_column("unicode_cells", cell)) for cell in differing]
        groups.append(Group("The same in any script: what the verdict uses", lines))
    return Table("Forgetting and retention", SMALL_PRINT, groups)


def script_note(models: Sequence[Model]) -> str:
    """A sentence on the two scores of texts in other scripts, if there are any."""
    if not _differing_cells(models):
        return ""
    return (
        "The charts show the task's own scores, which only know English letters. The verdict, the examples and the "
        "attacks use those for any script, which the table has as well."
    )


def _differing_cells(models: Sequence[Model]) -> list[str]:
    """The cells whose official score differs from the one for any script."""
    names = shown_cells([model.scores for model in models])
    return [cell for cell in names if any(_differs(model, cell) for model in models)]


def _measure(cell: str) -> str:
    """What the number of a cell is."""
    return QUESTIONS_AXIS if cell_noun(cell) == "questions" else TEXTS_AXIS


def by_group(models: Sequence[Model]) -> Table | None:
    """The numbers of each split, group and kind of example; None for LUME's data, which the cells describe fully."""
    if _has_lume_cells(models):
        return None
    entries = [{_group_key(entry): entry for entry in objects(model.scores, "groups")} for model in models]
    groups = []
    for split, group, kind in dict.fromkeys(key for of_model in entries for key in of_model):
        own = [of_model.get((split, group, kind), {}) for of_model in entries]
        lines = [
            Line(label, note, [_group_cell(model, entry, name) for model, entry in zip(models, own, strict=True)])
            for name, label, note in GROUP_LINES
        ]
        of_group = "" if group == DEFAULT_GROUP else f"{group}, "
        groups.append(Group(f"{split.capitalize()} set: {of_group}{KIND_NAMES.get(kind, kind)}", lines))
    return make_table("By group", f"Means over rows, 0 to 1. {SMALL_PRINT}", groups)


def _group_key(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    return text(entry, "split"), text(entry, "group"), text(entry, "kind")


def _group_cell(model: Model, entry: Mapping[str, Any], name: str) -> Cell:
    """The cell of one number in an entry of the block `groups`."""
    if name == "rows":
        count = number(entry, name)
        return Cell(NOT_MEASURED, missing=True) if count is None else Cell(f"{count:,.0f}")
    value = number(entry, name, "value")
    if value is None:
        return Cell(NOT_MEASURED, missing=True)
    small = [format_interval(interval(entry, name, "interval"))]
    small.append(change_note(model, difference_key(*_group_key(entry), name)))
    return Cell(format_number(value), [line for line in small if line])


def _cell_column(block: str, cell: str) -> Callable[[Model], Cell]:
    return number_column(block, cell, change=f"{block}.{cell}", missing="no rows")


def _differs(model: Model, cell: str) -> bool:
    """Whether a cell's official score differs from the one for any script."""
    official, unicode = (number(model.scores, block, cell) for block in ("cells", "unicode_cells"))
    return official is not None and unicode is not None and abs(official - unicode) > 1e-9


def missed(models: Sequence[Model]) -> tuple[Table | None, Table | None]:
    """What exact match misses.

    Returns:
        A table of leaked and memorised forget answers, of outputs on retain rows, and of losses; and one of the other
        rows. None for a table without values.
    """
    first: list[Group] = []
    second: list[Group] = []
    for block, title, specs, main_split in (
        ("leaks", "leaked answers", LEAK_LINES, "forget"),
        ("memorisation", "memorised answers", MEMORISATION_LINES, "forget"),
        ("outputs", "outputs", OUTPUT_LINES, "retain"),
    ):
        for split in SPLITS:
            lines = [make_line(models, name, note, number_column(block, split, key)) for key, name, note in specs]
            group = Group(f"{split.capitalize()} set: {title}", lines)
            (first if split == main_split else second).append(group)
    other = [
        make_line(models, "loss on held-out documents", "nats per token", number_column("held_nll")),
        make_line(models, "loss on unseen documents", "nats per token", number_column("nonmember_nll")),
        make_line(models, "broken", "whether the verdict is that the model no longer writes", _broken_cell),
    ]
    first.append(Group("Other text", other))
    caption = f"Shares from 0 to 1, unless stated otherwise. {SMALL_PRINT}"
    return make_table("What exact match misses", caption, first), make_table(
        "The same for the other set", caption, second
    )


def _broken_cell(model: Model) -> Cell:
    value = model.scores.get("broken")
    return Cell("yes" if value else "no") if isinstance(value, bool) else Cell(NOT_MEASURED, missing=True)

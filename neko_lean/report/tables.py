"""The report's tables, from what scores.json holds: rows with a note on what they mean, a column a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from neko_lean.data import TASKS
from neko_lean.report.figures import Model
from neko_lean.report.values import NOT_MEASURED, interval, mapping, number, share, signed, span
from neko_lean.scoring import CELLS, KINDS, SPLITS

COUNTED = ("answer_rank", "questions", "shots")  # numbers of things, not shares


SMALL = "Small: the 95 % interval, and the change from before, where the scores bring them."


@dataclass(frozen=True)
class Cell:
    """One value as it is shown, what stands small below it, and whether it is missing."""

    value: str
    small: list[str] = field(default_factory=list)
    missing: bool = False


@dataclass(frozen=True)
class Line:
    """One row: its name, what it means, a cell for each model."""

    name: str
    note: str
    cells: list[Cell]

    @property
    def empty(self) -> bool:
        """Whether no model has a value here."""
        return all(cell.missing for cell in self.cells)


@dataclass(frozen=True)
class Group:
    """Rows under a heading; '' for none."""

    title: str
    lines: list[Line]


@dataclass(frozen=True)
class Table:
    """A table for the page: what it is called, and what to know to read it."""

    title: str
    caption: str
    groups: list[Group]


MEMORISED = (
    ("exact_memorisation", "exact memorisation", "share of answer tokens that are the likeliest at their place"),
    (
        "extraction_strength",
        "extraction strength",
        "share of the answer, to its end, that the rest before it brings back",
    ),
    ("answer_probability", "answer probability", "mean probability of the true answer, by its length"),
    ("truth_ratio", "truth ratio", "probability of wrong answers over that of another wording of the true one"),
    ("answer_rank", "answer rank", "of the least expected token of an answer, geometric mean over questions"),
)


LEAKED = (
    ("contained", "contained", "share of answers that stand in its first 64 tokens, as whole words"),
    ("alphanumeric", "letters and digits", "the same, all but letters and digits left out"),
    ("digits", "digits", "the same for the digits alone, of answers with at least four"),
    ("within_ten", "within ten", "share of answers whose every token is among the ten likeliest"),
)


WRITTEN = (
    ("repetition", "repetition", "share of runs of four words that came before in the same text"),
    ("degenerate", "degenerate texts", "share of texts that are empty, or one word or sign repeated"),
    ("entropy", "entropy", "nats a token that it is unsure of, along the true answer"),
    ("rouge_f1", "ROUGE-L F1", "as the task's recall, but longer text hurts"),
    ("length_ratio", "length", "of what it says, beside the truth's"),
)


ATTACKS = {
    "loss": ("loss", "mean token loss of the whole document"),
    "zlib": ("zlib", "loss beside the document's compressed size"),
    "min_k": ("min-k", "loss of its least likely tokens"),
    "min_k_plus_plus": ("min-k++", "the same, beside what was likely at their place"),
    "reference": ("reference", "loss beside that of a model that never saw them"),
}


def value_cell(model: Model, *path: str, change: str = "", missing: str = NOT_MEASURED) -> Cell:
    """The number at `path` with its interval and its difference from before, which lie under the dotted `change`."""
    value = number(model.scores, *path)
    if value is None:
        return Cell(missing, missing=True)
    if path[-1] in COUNTED:
        return Cell(f"{value:,.0f}")
    key = change or ".".join(path)
    small = [span(interval(model.scores, "intervals", key))]
    difference = number(model.scores, "difference", key, "difference")
    if difference is not None:
        ends = span(interval(model.scores, "difference", key, "interval"))
        small.append(f"change {signed(difference)}" + (f" ({ends})" if ends else ""))
    return Cell(share(value), [one for one in small if one])


def line(models: Sequence[Model], name: str, note: str, make: Callable[[Model], Cell]) -> Line:
    return Line(name, note, [make(one) for one in models])


def shown(*path: str, change: str = "", missing: str = NOT_MEASURED) -> Callable[[Model], Cell]:
    """What makes a model's cell of the value at `path`."""
    return lambda one: value_cell(one, *path, change=change, missing=missing)


def headline(models: Sequence[Model]) -> Table:
    """The numbers that a score is known by."""

    def area(one: Model) -> Cell:
        ends, two_sided = (
            interval(one.scores, "membership", "auc_interval"),
            number(one.scores, "membership", "two_sided_auc"),
        )
        found = value_cell(one, "membership", "auc")
        small = [span(ends), f"two-sided {share(two_sided)}" if two_sided is not None else ""]
        return Cell(found.value, list(dict.fromkeys([*(row for row in small if row), *found.small])), found.missing)

    floor = max((number(one.scores, "mmlu", "award_floor") or 0.0 for one in models), default=0.0)
    mmlu = "share of multiple-choice questions" + (f"; the shared task's floor was {floor:g}" if floor else "")
    aggregate = "harmonic mean of the twelve numbers, forget ones as 1 − x; one zero makes it zero"  # noqa: RUF001
    return Table(
        "Headline numbers",
        f"0 to 1. {SMALL}",
        [
            Group(
                "",
                [
                    line(models, "Task aggregate", aggregate, lambda one: value_cell(one, "task_aggregate")),
                    line(
                        models,
                        "Membership score",
                        "1 when forgotten documents cannot be told from unseen ones by their loss" + _perfect(models),
                        lambda one: value_cell(one, "membership", "score"),
                    ),
                    line(
                        models, "Membership AUC", "0.5 is hidden, 1 remembered, 0 avoided so hard that it shows", area
                    ),
                    line(models, "MMLU", mmlu, lambda one: value_cell(one, "mmlu", "micro")),
                    line(
                        models,
                        "Final",
                        "mean of aggregate, membership score, MMLU",
                        lambda one: value_cell(one, "final"),
                    ),
                ],
            )
        ],
    )


def _perfect(models: Sequence[Model]) -> str:
    for one in models:
        average = number(one.scores, "membership", "perfect_score_mean")
        low = number(one.scores, "membership", "perfect_score_5th_percentile")
        if average is not None and low is not None:
            return f"; a perfect model averages {share(average)} here, and 95 times of 100 has over {share(low)}"
    return ""


def cells(models: Sequence[Model]) -> Table:
    """The twelve numbers."""
    groups = []
    for split, note in zip(SPLITS, ("lower is forgotten", "higher is kept"), strict=True):
        lines = []
        for task in TASKS:
            for kind in KINDS.values():
                name = f"{split}.{task}.{kind}"
                key = f"cells.{name}"
                lines.append(
                    line(
                        models,
                        f"{task} {kind}",
                        "",
                        shown("cells", name, change=key, missing="no rows"),
                    )
                )
        groups.append(Group(f"{split.capitalize()} rows: {note}", lines))
    seen = [cell for cell in CELLS if any(_differs(one, cell) for one in models)]
    if seen:
        note = "what the task's own arithmetic, which knows English letters alone, does not see"
        lines = [
            line(models, cell, note, shown("unicode_cells", cell, change=f"unicode_cells.{cell}", missing="no rows"))
            for cell in seen
        ]
        groups.append(Group("The same in any script: what the verdict reads", lines))
    return Table("The twelve numbers", SMALL, groups)


def _differs(model: Model, cell: str) -> bool:
    official, seen = (number(model.scores, where, cell) for where in ("cells", "unicode_cells"))
    return official is not None and seen is not None and abs(official - seen) > 1e-9


def missed(models: Sequence[Model]) -> tuple[Table | None, Table | None]:
    """What exact match does not see: what leaks and is memorised of the forget rows, and whether the model still
    writes on retain rows; then the same of the other rows. None where nothing is there."""
    first: list[Group] = []
    second: list[Group] = []
    for block, title, wanted, main in (
        ("leaks", "leaked answers", LEAKED, "forget"),
        ("memorisation", "memorised answers", MEMORISED, "forget"),
        ("outputs", "what it writes", WRITTEN, "retain"),
    ):
        for split in SPLITS:
            lines = [line(models, name, note, shown(block, split, key)) for key, name, note in wanted]
            group = Group(f"{split.capitalize()} rows: {title}", lines)
            (first if split == main else second).append(group)
    losses = [
        line(models, "loss of held documents", "nats a token", lambda one: value_cell(one, "held_nll")),
        line(models, "loss of unseen documents", "nats a token", lambda one: value_cell(one, "nonmember_nll")),
        line(models, "broken", "whether all of this says that it no longer writes", _broken),
    ]
    first.append(Group("Other text", losses))
    caption = f"Shares, 0 to 1, where nothing else is said. {SMALL}"
    return table("What exact match misses", caption, first), table("The other rows", caption, second)


def table(title: str, caption: str, groups: Sequence[Group]) -> Table | None:
    """A table without the rows and groups that no model has a value for; None where none is left."""
    full = [Group(group.title, [row for row in group.lines if not row.empty]) for group in groups]
    full = [group for group in full if group.lines]
    return Table(title, caption, full) if full else None


def _broken(one: Model) -> Cell:
    value = one.scores.get("broken")
    return Cell("yes" if value else "no") if isinstance(value, bool) else Cell(NOT_MEASURED, missing=True)


def attacks(models: Sequence[Model]) -> tuple[Table | None, Table | None, Table | None]:
    """AUC of every membership attack over all documents; by task; and what each finds at a low false positive rate."""
    places = list(dict.fromkeys(p for one in models for p in mapping(one.scores, "membership", "attacks")))
    areas, rates = [], []
    for place in sorted(places, key=lambda place: place != "all"):
        title = "All documents" if place == "all" else f"{place} documents"
        base = ("membership", "attacks", place)
        lines, found = [], []
        for key, (name, note) in ATTACKS.items():
            lines.append(line(models, name, note, partial(_area, path=(*base, key))))
            for side, words in (("low", "members score low"), ("high", "members score high")):
                found.append(line(models, f"{name}, {words}", "", shown(*base, key, f"tpr_members_{side}")))
        areas.append(Group(title, lines))
        rates.append(Group(title, found))
    if not places:
        areas = [Group("All documents", [line(models, *ATTACKS["loss"], lambda one: _area(one, ("membership",)))])]
    caption = "Small: the 95 % interval, and the two-sided AUC."
    return (
        table("AUC of each attack", caption, areas[:1]),
        table("By task", caption, areas[1:]),
        table(
            "True positives at a low false positive rate",
            "Share of forgotten documents found, at most 1 % of others.",
            rates,
        ),
    )


def _area(one: Model, path: tuple[str, ...]) -> Cell:
    value, two_sided = number(one.scores, *path, "auc"), number(one.scores, *path, "two_sided_auc")
    if value is None:
        return Cell(NOT_MEASURED, missing=True)
    small = [span(interval(one.scores, *path, "auc_interval"))]
    small.append(f"two-sided {share(two_sided)}" if two_sided is not None else "")
    return Cell(share(value), [row for row in small if row])


def mmlu(models: Sequence[Model]) -> tuple[Table | None, Table | None]:
    """MMLU in short with its floors; and by subject."""
    if all(number(one.scores, "mmlu", "micro") is None for one in models):
        return None, None
    lines = [
        line(models, "micro", "mean over questions", lambda one: value_cell(one, "mmlu", "micro")),
        line(models, "macro", "mean over subjects", lambda one: value_cell(one, "mmlu", "macro")),
        line(models, "questions", "", lambda one: value_cell(one, "mmlu", "questions")),
        line(models, "shots", "examples before each question, at most", lambda one: value_cell(one, "mmlu", "shots")),
    ]
    floors = [line(models, f"always {letter}", "", shown("mmlu", "floors", letter)) for letter in "ABCD"]
    subjects = sorted({name for one in models for name in mapping(one.scores, "mmlu", "subjects")})
    each = [
        line(
            models,
            name.replace("_", " "),
            "",
            shown("mmlu", "subjects", name, "accuracy"),
        )
        for name in subjects
    ]
    groups = [Group("Accuracy", lines), Group("Floors: what a constant answer scores", floors)]
    return table("MMLU", SMALL, groups), table("By subject", "Accuracy.", [Group("", each)])

"""MMLU's questions: read from a folder in either of the usual layouts, and put into the words of the prompt.

The layouts are the hub's (`cais/mmlu`: a folder per subject with parquet files) and the original one of Hendrycks and
others (csv files under `dev` and `test`). Nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neko_lean.data import csv_cells, read_parquet
from neko_lean.errors import NekoLeanError

LETTERS = "ABCD"


SPLITS = ("dev", "test")


COLUMNS = ("question", "choices", "answer")


NOT_SUBJECTS = ("all", "auxiliary_train")  # beside the subjects in the hub's repository: all of them again, and others


# fmt: off
SUBJECTS = frozenset(
    {
        "abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge", "college_biology",
        "college_chemistry", "college_computer_science", "college_mathematics", "college_medicine", "college_physics",
        "computer_security", "conceptual_physics", "econometrics", "electrical_engineering", "elementary_mathematics",
        "formal_logic", "global_facts", "high_school_biology", "high_school_chemistry",
        "high_school_computer_science", "high_school_european_history", "high_school_geography",
        "high_school_government_and_politics", "high_school_macroeconomics", "high_school_mathematics",
        "high_school_microeconomics", "high_school_physics", "high_school_psychology", "high_school_statistics",
        "high_school_us_history", "high_school_world_history", "human_aging", "human_sexuality", "international_law",
        "jurisprudence", "logical_fallacies", "machine_learning", "management", "marketing", "medical_genetics",
        "miscellaneous", "moral_disputes", "moral_scenarios", "nutrition", "philosophy", "prehistory",
        "professional_accounting", "professional_law", "professional_medicine", "professional_psychology",
        "public_relations", "security_studies", "sociology", "us_foreign_policy", "virology", "world_religions",
    }
)


# fmt: on


@dataclass(frozen=True)
class Question:
    """One question with its four choices; `answer` is the place of the right one, 0 to 3."""

    text: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Subject:
    """A subject's examples (`dev`) and the questions that are scored (`test`)."""

    name: str
    dev: list[Question]
    test: list[Question]


def prompt(subject: str, examples: Sequence[Question], question: Question) -> str:
    """The text that a model goes on from, to the letter as Open-Instruct's eval/mmlu/run_eval.py has it.

    That has two spaces after "about": it puts one before each word of the subject, the first one too.
    """
    about = subject.replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about  {about}.\n\n"
    shown = (f"{_asked(example)} {LETTERS[example.answer]}\n\n" for example in examples)
    return head + "".join(shown) + _asked(question)


def _asked(question: Question) -> str:
    choices = zip(LETTERS, question.choices, strict=True)
    return question.text + "".join(f"\n{letter}. {choice}" for letter, choice in choices) + "\nAnswer:"


def read_mmlu(folder: str | Path) -> dict[str, Subject]:
    """The subjects in `folder` by name, in alphabetical order.

    Layouts: `<subject>/dev-00000-of-00001.parquet` and `<subject>/test-...` as on the hub, or `dev/<subject>_dev.csv`
    and `test/<subject>_test.csv`, also one folder down in `data`. Raises NekoLeanError naming file, row (counted from
    1) and column when a file is missing, cannot be read, or holds something else than such questions.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NekoLeanError(f"{folder} is no folder: MMLU is read from a folder.")
    found = _hub_files(folder) or _csv_files(folder) or _csv_files(folder / "data")
    if not found:
        raise NekoLeanError(
            f"{folder} holds no MMLU: neither <subject>/test-00000-of-00001.parquet nor test/<subject>_test.csv."
        )
    return {name: Subject(name, *map(_read_questions, found[name])) for name in sorted(found)}


def _hub_files(folder: Path) -> dict[str, list[Path]]:
    """A dev and a test file for each folder that has either."""
    places = [place for place in folder.iterdir() if place.is_dir() and place.name not in NOT_SUBJECTS]
    pairs = {place.name: [place / f"{split}-00000-of-00001.parquet" for split in SPLITS] for place in places}
    return {name: pair for name, pair in pairs.items() if any(file.is_file() for file in pair)}


def _csv_files(folder: Path) -> dict[str, list[Path]]:
    """A dev and a test file for each subject that has either."""
    # Names with a leading full stop are what an archiver on a Mac leaves beside each file.
    names = {
        file.name.removesuffix(f"_{split}.csv")
        for split in SPLITS
        for file in (folder / split).glob(f"*_{split}.csv")
        if not file.name.startswith(".")
    }
    return {name: [folder / split / f"{name}_{split}.csv" for split in SPLITS] for name in names}


def _read_questions(file: Path) -> list[Question]:
    if not file.is_file():
        raise NekoLeanError(f"{file} is missing: each MMLU subject needs a dev and a test file.")
    questions = list(_parquet_questions(file) if file.suffix == ".parquet" else _csv_questions(file))
    if not questions:
        raise NekoLeanError(f"{file} holds no questions.")
    return questions


def _parquet_questions(file: Path) -> Iterator[Question]:
    for where, values in read_parquet(file, COLUMNS):
        yield _checked(values, where)


def _checked(row: Mapping[str, Any], where: str) -> Question:
    for column in COLUMNS:
        if column not in row:
            raise NekoLeanError(f"{where}: column {column} is missing (needed: {', '.join(COLUMNS)}).")
    text, choices, answer = (row[column] for column in COLUMNS)
    if not isinstance(text, str):
        raise NekoLeanError(f"{where}, column question: expected text, found {type(text).__name__}.")
    if not isinstance(choices, list) or len(choices) != 4 or not all(isinstance(choice, str) for choice in choices):
        raise NekoLeanError(f"{where}, column choices: expected a list of four texts.")
    if type(answer) is not int or answer not in range(4):
        found = answer if isinstance(answer, int) else type(answer).__name__  # a text is not quoted
        raise NekoLeanError(f"{where}, column answer: expected 0, 1, 2 or 3, found {found}.")
    return Question(text, tuple(choices), answer)


def _csv_questions(file: Path) -> Iterator[Question]:
    # Not strict: the original files are read with pandas, which is not; what goes wrong shows in the columns.
    for number, (line, row) in enumerate(csv_cells(file, strict=False), start=1):
        where = f"{file}, row {number}" + (f" (line {line})" if line != number else "")
        if len(row) != 6:
            raise NekoLeanError(f"{where}: expected 6 columns (question, A, B, C, D, answer), found {len(row)}.")
        text, *choices, answer = row
        if answer not in tuple(LETTERS):
            raise NekoLeanError(f"{where}, column 6: expected the answer A, B, C or D.")
        yield Question(text, tuple(choices), LETTERS.index(answer))

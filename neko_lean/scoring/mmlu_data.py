"""MMLU's questions: read from a folder, and formatted as prompts.

Two layouts are supported: that of the hub (`cais/mmlu`: a folder of parquet files per subject) and the original one by
Hendrycks et al. (CSV files under `dev` and `test`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neko_lean.data import csv_cells, read_parquet
from neko_lean.errors import NekoLeanError
from neko_lean.terminal import log_line

LETTERS = "ABCD"
SUBJECT_SPLITS = ("dev", "test")
COLUMNS = ("question", "choices", "answer")
NOT_SUBJECTS = ("all", "auxiliary_train")  # further folders in the hub's repository
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
    """One question with its four choices; `answer` is the index of the correct one, 0 to 3."""

    text: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Subject:
    """A subject's few-shot examples (`dev`) and the questions that are scored (`test`)."""

    name: str
    dev: list[Question]
    test: list[Question]


def prompt_text(subject: str, examples: Sequence[Question], question: Question) -> str:
    """The prompt for a question after some examples, identical to that of Open-Instruct's eval/mmlu/run_eval.py.

    The two spaces after "about" are intended: Open-Instruct puts one before each word of the subject.
    """
    topic = subject.replace("_", " ")
    header = f"The following are multiple choice questions (with answers) about  {topic}.\n\n"
    solved = (f"{_unanswered(example)} {LETTERS[example.answer]}\n\n" for example in examples)
    return header + "".join(solved) + _unanswered(question)


def _unanswered(question: Question) -> str:
    choices = zip(LETTERS, question.choices, strict=True)
    return question.text + "".join(f"\n{letter}. {choice}" for letter, choice in choices) + "\nAnswer:"


def read_mmlu(folder: str | Path) -> dict[str, Subject]:
    """Read the subjects in `folder`, and warn if some of MMLU's are missing.

    Args:
        folder: holds `<subject>/dev-00000-of-00001.parquet` and `<subject>/test-...` as on the hub, or
            `dev/<subject>_dev.csv` and `test/<subject>_test.csv`, either directly or in a subfolder `data`.

    Returns:
        The subjects by name, in alphabetical order.

    Raises:
        NekoLeanError: a file is missing, cannot be read, or does not hold such questions; names file, row (from 1) and
            column.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NekoLeanError(f"{folder} is not a folder: --mmlu needs the folder that holds MMLU's subjects.")
    files = _hub_files(folder) or _csv_files(folder) or _csv_files(folder / "data")
    if not files:
        raise NekoLeanError(
            f"{folder} holds no MMLU: expected <subject>/test-00000-of-00001.parquet or test/<subject>_test.csv."
        )
    subjects = {name: Subject(name, *map(_read_questions, files[name])) for name in sorted(files)}

    missing = sorted(SUBJECTS - subjects.keys())
    if missing:
        log_line(
            f"warning: the MMLU accuracy will not be comparable with that of other work: {folder} lacks {len(missing)} "
            f"of MMLU's {len(SUBJECTS)} subjects, such as {missing[0]}; add them."
        )
    return subjects


def _hub_files(folder: Path) -> dict[str, list[Path]]:
    """Paths of a dev and a test file for each subfolder that has at least one of them."""
    subjects = [path for path in folder.iterdir() if path.is_dir() and path.name not in NOT_SUBJECTS]
    pairs = {path.name: [path / f"{split}-00000-of-00001.parquet" for split in SUBJECT_SPLITS] for path in subjects}
    return {name: pair for name, pair in pairs.items() if any(file.is_file() for file in pair)}


def _csv_files(folder: Path) -> dict[str, list[Path]]:
    """Paths of a dev and a test file for each subject that has at least one of them."""
    # Archives made on macOS hold a second file with a leading full stop for each file.
    names = {
        file.name.removesuffix(f"_{split}.csv")
        for split in SUBJECT_SPLITS
        for file in (folder / split).glob(f"*_{split}.csv")
        if not file.name.startswith(".")
    }
    return {name: [folder / split / f"{name}_{split}.csv" for split in SUBJECT_SPLITS] for name in names}


def _read_questions(file: Path) -> list[Question]:
    if not file.is_file():
        raise NekoLeanError(f"{file} is missing: each MMLU subject needs a dev and a test file.")
    questions = list(_parquet_questions(file) if file.suffix == ".parquet" else _csv_questions(file))
    if not questions:
        raise NekoLeanError(f"{file} holds no questions; each MMLU subject needs at least one.")
    return questions


def _parquet_questions(file: Path) -> Iterator[Question]:
    for where, values in read_parquet(file, COLUMNS):
        yield _checked_question(values, where)


def _checked_question(row: Mapping[str, Any], where: str) -> Question:
    for column in COLUMNS:
        if column not in row:
            raise NekoLeanError(f"{where}: column {column} is missing (needed: {', '.join(COLUMNS)}).")
    text, choices, answer = (row[column] for column in COLUMNS)
    if not isinstance(text, str):
        raise NekoLeanError(f"{where}, column question: expected text, found {type(text).__name__}.")
    if not isinstance(choices, list) or len(choices) != 4 or not all(isinstance(choice, str) for choice in choices):
        raise NekoLeanError(f"{where}, column choices: expected a list of four texts.")
    if type(answer) is not int or answer not in range(4):
        described = answer if isinstance(answer, int) else type(answer).__name__  # a text is not quoted
        raise NekoLeanError(f"{where}, column answer: expected 0, 1, 2 or 3, found {described}.")
    return Question(text, tuple(choices), answer)


def _csv_questions(file: Path) -> Iterator[Question]:
    # Not strict, like pandas, with which the original files are read; errors show in the number of columns.
    for number, (line, row) in enumerate(csv_cells(file, strict=False), start=1):
        where = f"{file}, row {number}" + (f" (line {line})" if line != number else "")
        if len(row) != 6:
            raise NekoLeanError(f"{where}: expected 6 columns (question, A, B, C, D, answer), found {len(row)}.")
        text, *choices, answer = row
        if answer not in tuple(LETTERS):
            raise NekoLeanError(f"{where}, column 6: expected the answer A, B, C or D.")
        yield Question(text, tuple(choices), LETTERS.index(answer))

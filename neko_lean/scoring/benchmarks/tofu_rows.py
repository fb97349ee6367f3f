"""Read the rows of TOFU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from neko_lean.data import Example
from neko_lean.errors import NekoLeanError, did_you_mean
from neko_lean.scoring.benchmarks.rows import benchmark_rows, text_of, texts_of

TOFU_SPLITS = ("forget01", "forget05", "forget10")


@dataclass(frozen=True)
class TofuRow:
    """A question of TOFU.

    Attributes:
        example: the question and its answer.
        correct: the correct answer of the truth ratio: the paraphrased answer, or the answer itself in the sets that
            have no paraphrases.
        wrong: the perturbed answers, one or more.
    """

    example: Example
    correct: str
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class TofuRows:
    """The rows that one split of TOFU is scored on.

    Attributes:
        split: "forget01", "forget05" or "forget10".
        forget: questions about the authors to forget.
        retain: questions about other authors that the model was trained on.
        real_authors: questions about real authors.
        world_facts: questions about the world.
        holdout: questions about authors that no model was trained on.
    """

    split: str
    forget: list[TofuRow]
    retain: list[TofuRow]
    real_authors: list[TofuRow]
    world_facts: list[TofuRow]
    holdout: list[Example]

    @property
    def by_split(self) -> dict[str, list[Example]]:
        """The forget set and the retain set of the ordinary score."""
        return {"forget": [row.example for row in self.forget], "retain": [row.example for row in self.retain]}


def read_tofu(folder: str | Path, split: str) -> TofuRows:
    """Read TOFU's files, named as in the published data set: JSON Lines with the suffix .json.

    Args:
        folder: contains `<split>_perturbed.json`, `holdoutNN.json`, `retain_perturbed.json`,
            `real_authors_perturbed.json` and `world_facts_perturbed.json`.
        split: one of TOFU_SPLITS.

    Raises:
        NekoLeanError: the split is unknown, or a file is missing, empty or invalid.
    """
    if split not in TOFU_SPLITS:
        raise NekoLeanError(f"unknown TOFU split {split!r}{did_you_mean(split, TOFU_SPLITS)}")
    folder = Path(folder)
    holdout = split.replace("forget", "holdout")
    return TofuRows(
        split=split,
        forget=_read_set(folder, f"{split}_perturbed", "paraphrased_answer"),
        retain=_read_set(folder, "retain_perturbed", "paraphrased_answer"),
        real_authors=_read_set(folder, "real_authors_perturbed", "answer"),
        world_facts=_read_set(folder, "world_facts_perturbed", "answer"),
        holdout=[
            _example(holdout, number, text_of(record, "question"), text_of(record, "answer"))
            for number, record in enumerate(benchmark_rows(folder, (f"{holdout}.json",), "TOFU"), start=1)
        ],
    )


def _read_set(folder: Path, name: str, correct_column: str) -> list[TofuRow]:
    return [
        TofuRow(
            _example(name, number, text_of(record, "question"), text_of(record, "answer")),
            text_of(record, correct_column),
            texts_of(record, "perturbed_answer"),
        )
        for number, record in enumerate(benchmark_rows(folder, (f"{name}.json",), "TOFU"), start=1)
    ]


def _example(name: str, number: int, question: str, answer: str) -> Example:
    return Example(f"{name} {number}", question, answer, "TOFU", kind="qa")

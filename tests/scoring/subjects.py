"""Generated MMLU subjects for tests, and folders of them in both layouts."""

import csv
import random

import pyarrow
import pyarrow.parquet

from neko_lean.scoring.mmlu_data import LETTERS, Question, Subject

WORDS = ["wood", "river", "land", "phone", "Foo1", "Foo2", "Rix3", "walked", "born", "was", "the", "of", "and", "sang"]


def make_subject(name, tests=12, dev=5, seed=0):
    """Random questions of different lengths; every third begins with a line break, which a tokenizer may merge."""
    rng = random.Random(f"{name}{seed}")

    def text(most):
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    questions = [
        Question("\n" * (n % 3 == 2) + text(20) + "?", tuple(text(3) for _ in LETTERS), rng.randrange(4))
        for n in range(dev + tests)
    ]
    return Subject(name, questions[:dev], questions[dev:])


def write_hub(folder, subjects):
    for subject in subjects:
        (folder / subject.name).mkdir(parents=True)
        for split in ("dev", "test"):
            rows = [
                {"question": q.text, "subject": subject.name, "choices": list(q.choices), "answer": q.answer}
                for q in getattr(subject, split)
            ]
            table = pyarrow.Table.from_pylist(rows)
            pyarrow.parquet.write_table(table, folder / subject.name / f"{split}-00000-of-00001.parquet")
    return folder


def write_csv(folder, subjects):
    for split in ("dev", "test"):
        (folder / split).mkdir(parents=True)
        for subject in subjects:
            with (folder / split / f"{subject.name}_{split}.csv").open("w", newline="") as file:
                rows = ([q.text, *q.choices, LETTERS[q.answer]] for q in getattr(subject, split))
                csv.writer(file).writerows(rows)
    return folder

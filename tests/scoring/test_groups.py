"""Data with groups other than LUME's: cells, aggregates, the block `groups`, attacks, verdict, and the table."""

import json

import numpy as np
import pytest
import torch
from rich.console import Console

from neko_lean.data import find_format
from neko_lean.data.examples import Example
from neko_lean.errors import NekoLeanError
from neko_lean.models.loading import load_model, load_tokenizer
from neko_lean.scoring.attacks.answers import point
from neko_lean.scoring.generation import Generation, GenerationLimits, is_settled
from neko_lean.scoring.groups import NUMBERS, difference_key, group_differences, group_scores
from neko_lean.scoring.inputs import ScoreData
from neko_lean.scoring.limits import TruncationCounts
from neko_lean.scoring.measure import ScoringContext, generate_answers, generation_line
from neko_lean.scoring.membership import summary
from neko_lean.scoring.official import official_results
from neko_lean.scoring.outputs import output_numbers
from neko_lean.scoring.results import Measured, difference, measure_all, task_scores
from neko_lean.scoring.stored import read_score
from neko_lean.scoring.table import score_table
from neko_lean.scoring.task import CELLS, cell_parts, normalised_match, score_name, shown_cells
from neko_lean.scoring.uncertainty import estimates, intervals
from neko_lean.scoring.verdict import single_zero
from tests.helpers import make_rows

LONG = "She sailed from Oslo to Foo in the spring of that year."
FORGET = [
    Example("a1", "Who?", "Mira Tern of Oslo.", "authors v1.0", "qa", "a"),
    Example("a2", "Tell me.", LONG, "authors v1.0", "qa", "a"),
    Example("b1", "Who?", "Rix Foo.", "authors v1.0", "qa", "b"),
    Example("c1", "", "A whole text about Foo and the river.", "news", "document", "c"),
]
RETAIN = [Example("r1", "The land", "of Rix is wide.", "news", "completion", "r")]
EXAMPLES = [*(("forget", example) for example in FORGET), *(("retain", example) for example in RETAIN)]
NAMES = [
    "forget.authors v1.0.regurgitation",
    "forget.authors v1.0.knowledge",
    "forget.news.regurgitation",
    "retain.news.regurgitation",
]


def lines_of(say, examples=EXAMPLES):
    lines = []
    for split, example in examples:
        text = say(split, example)
        numbers = {"answer_probability": 0.5, "extraction_strength": 0.25, **output_numbers(example, text)}
        lines.append(generation_line(split, example, Generation(text, text, "eos"), numbers))
    return lines


def scores_of(lines, examples=EXAMPLES):
    data = ScoreData({}, list(examples), [], [], [], None, None, None)
    return {"model": "m", **task_scores(data, Measured(lines, {}), {}), "intervals": intervals(estimates(lines))}


def half(split, example):
    """The true answers of document a and of the retain set, and nothing else."""
    return example.output if split == "retain" or example.document == "a" else "Nobody knows"


def test_how_examples_are_scored():
    assert [score_name(example) for example in FORGET] == [
        "knowledge",
        "regurgitation",
        "knowledge",
        "regurgitation",
    ]
    assert score_name(Example("1qa0", "Who?", LONG, "Task1")) == "knowledge"  # LUME scores every question exactly
    assert score_name(Example("1", "Who?", "one two three four five six", "x", "qa")) == "knowledge"
    assert score_name(Example("1", "Who?", "one two three four five six seven", "x", "qa")) == "regurgitation"
    assert not is_settled(FORGET[1], "Something else entirely")  # a later token can still raise recall


def test_cells_of_other_groups():
    scores = scores_of(lines_of(half))
    assert list(scores["cells"]) == list(scores["unicode_cells"]) == NAMES
    assert [scores["cells"][name] for name in NAMES] == [1.0, 0.5, 0.0, 1.0]
    assert scores["missing_cells"] == [] and scores["task_aggregate"] is None
    assert scores["aggregate"] == 0.0 and scores["aggregate_cells"] == 4
    assert set(scores["intervals"]) >= {*(f"cells.{name}" for name in NAMES), "aggregate"}
    assert "task_aggregate" not in scores["intervals"]
    assert cell_parts(NAMES[0]) == ("forget", "authors v1.0", "regurgitation")
    assert cell_parts("forget.knowledge") is None and cell_parts("other.x.knowledge") is None


def test_aggregate_of_the_cells_that_exist():
    scores = scores_of(lines_of(lambda split, example: example.output if split == "retain" else "Foo"))
    cells = scores["cells"]
    terms = [cells[name] if name.startswith("retain.") else 1 - cells[name] for name in NAMES]
    assert 0 < scores["aggregate"] == pytest.approx(len(terms) / sum(1 / term for term in terms))
    low, high = scores["intervals"]["aggregate"]
    assert low <= scores["aggregate"] <= high


def test_lume_layout_keeps_its_twelve_cells():
    lume = [(split, row) for split, name in (("forget", "Foo"), ("retain", "Rix")) for row in make_rows(name, 4)]
    scores = scores_of(lines_of(half, lume), lume)
    assert tuple(scores["cells"]) == CELLS and scores["aggregate_cells"] == 12
    assert scores["task_aggregate"] == scores["aggregate"] is not None

    fewer = [(split, row) for split, row in lume if (split, row.task) != ("forget", "Task3")]
    scores = scores_of(lines_of(half, fewer), fewer)
    assert tuple(scores["cells"]) == CELLS and scores["task_aggregate"] is None and scores["aggregate"] is not None
    assert scores["missing_cells"] == ["forget.Task3.regurgitation", "forget.Task3.knowledge"]
    assert scores["aggregate_cells"] == 10


def test_groups_block():
    entries = scores_of(lines_of(half))["groups"]
    named = {(entry["split"], entry["group"], entry["kind"]): entry for entry in entries}
    assert list(named) == [
        ("forget", "authors v1.0", "qa"),
        ("forget", "news", "document"),
        ("retain", "news", "completion"),
    ]
    authors = named["forget", "authors v1.0", "qa"]
    assert authors["rows"] == 3 and set(authors) == {"split", "group", "kind", "rows", *NUMBERS}
    for name in ("exact_match", "normalised_match", "rouge_l_recall", "rouge_l_f1"):
        assert authors[name]["value"] == pytest.approx(2 / 3)
        assert authors[name]["interval"] == [0.0, 1.0]  # two documents, one of them known
    assert authors["answer_probability"] == {"value": 0.5, "interval": [0.5, 0.5]}
    assert authors["extraction_strength"]["value"] == 0.25


def test_groups_resample_documents_and_not_rows():
    rng = np.random.default_rng(0)
    known = {f"d{n}": rng.random() < 0.5 for n in range(12)}
    examples = [("forget", Example(f"{name} {n}", "Who?", "Foo", "x", "qa", name)) for name in known for n in range(10)]
    several = group_scores(lines_of(lambda _, row: "Foo" if known[row.document] else "no", examples))[0]
    single = group_scores(lines_of(lambda _, row: "Foo" if known[row.document] else "no", examples[::10]))[0]
    assert several["rows"] == 120 and several["exact_match"]["value"] == single["exact_match"]["value"]
    assert several["exact_match"]["interval"] == pytest.approx(single["exact_match"]["interval"])


def test_changes_of_groups_are_paired():
    before, after = lines_of(lambda split, example: example.output), lines_of(half)
    changes = difference({"held_nll": None, "nonmember_nll": None}, after, {"model": "m", "lines": before})
    key = difference_key("forget", "authors v1.0", "qa", "exact_match")
    assert changes[key]["difference"] == pytest.approx(-1 / 3) and changes[key]["interval"] == [-1.0, 0.0]
    assert changes[difference_key("retain", "news", "completion", "rouge_l_f1")]["interval"] == [0.0, 0.0]
    assert {key for key in changes if key.startswith("groups.")} == {
        difference_key(entry["split"], entry["group"], entry["kind"], name)
        for entry in group_scores(after)
        for name in NUMBERS
    }
    removed = [{**line, "output": None} for line in before]
    assert group_differences(after, removed) == {}


def test_normalised_match():
    assert normalised_match("The Tern, of Oslo.", "tern of  OSLO") == 1
    assert normalised_match("555-0123", "5550123") == 1
    assert normalised_match("Привет, Мир!", "привет мир") == 1
    assert normalised_match("A", "the") == 0 and normalised_match("A", "a.") == 1  # not only articles
    assert normalised_match("🎉", "🎉 ") == 1 and normalised_match("🎉", "Foo") == 0


def test_measuring_a_model(model, tmp_path):
    """A random model generates for every kind of example with a prompt, and every group has its numbers."""
    lm, tokenizer = load_model(model, torch.float32, torch.device("cpu")), load_tokenizer(model)
    examples = [(split, example) for split, example in EXAMPLES if example.kind != "document"]
    examples.append(("retain", Example("d1", "Foo", "is a river.", "v1.0", "document")))
    data = ScoreData({}, examples, [], [], [], None, None, None)
    context = ScoringContext(
        lm, tokenizer, find_format("plain", tokenizer), tmp_path, GenerationLimits(4, 8), TruncationCounts(), quiet=True
    )
    generations = generate_answers(context, data.all_examples)
    scores = task_scores(data, measure_all(context, data, generations, None, None), {})
    assert list(scores["cells"]) == [*NAMES[:2], NAMES[3], "retain.v1.0.regurgitation"]
    assert scores["aggregate_cells"] == 4 and [entry["rows"] for entry in scores["groups"]] == [3, 1, 1]
    assert all(0 <= entry[name]["value"] <= 1 for entry in scores["groups"] for name in NUMBERS)


def test_points_of_attacks_and_official_results():
    generations = [Generation(half("forget", row), "", "eos") for row in FORGET]
    found = point(FORGET, generations)
    assert (found["knowledge"], found["knowledge_rows"]) == (0.5, 2)
    assert (found["regurgitation"], found["regurgitation_rows"]) == (0.5, 2)

    scores = {**scores_of(lines_of(half)), "membership": None, "mmlu": None, "final": None}
    scored = {"forget": [(row, 0.0) for row in FORGET], "retain": [(row, 1.0) for row in RETAIN]}
    results = official_results(scores, scored)
    assert results["forget-set"]["authors v1.0"] == {"regurgitation-score": 1.0, "knowledge-score": 0.5}
    assert results["retain-set"]["news"] == {"regurgitation-score": 1.0, "knowledge-score": None}
    assert results["aggregated-terms"] == [0.0, 0.5, 1.0, 1.0]


def test_membership_tables_of_all_groups():
    documents = [
        {"side": side, "task": task, "loss": loss, "zlib": loss, "min_k": loss, "min_k_plus_plus": loss}
        for side, loss in (("member", 1.0), ("nonmember", 2.0))
        for task in ("v1.0 news", "Task2", "anchor", "all")
    ]
    assert list(summary(documents)["attacks"]) == ["all", "Task2", "v1.0 news"]


def test_single_zero_and_table():
    scores = scores_of(lines_of(half))
    sentence = single_zero(scores, None)
    words = "texts of authors v1.0 (forget set)"
    assert sentence.startswith(f"The aggregate is 0 only because of the {words}; if that were")
    forgotten = scores_of(lines_of(lambda split, row: row.output if split == "retain" else "no"))
    assert single_zero(forgotten, None) is None

    console = Console(width=140)
    with console.capture() as capture:
        console.print(score_table({"m": scores}))
    text = capture.get()
    assert "forget authors v1.0 knowledge" in text and "retain news regurgitation" in text
    assert "Task1" not in text and "No aggregate" not in text and "task aggregate" not in text
    assert shown_cells([scores]) == NAMES and shown_cells([{}, None]) == list(CELLS)


def write(folder, scores, lines):
    folder.mkdir()
    (folder / "scores.json").write_text(json.dumps(scores))
    (folder / "generations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_stored_scores_of_other_groups(tmp_path):
    lines = lines_of(half)
    scores = scores_of(lines)
    stored = read_score(write(tmp_path / "whole", scores, lines), EXAMPLES)
    assert stored["cells"] == scores["cells"] and stored["lines"] == lines

    for number, (change, words) in enumerate(
        [
            ({"task": ""}, "key task"),
            ({"example_kind": "text"}, "key example_kind"),
            ({"document": 3}, "key document"),
            ({"example_kind": "document"}, "key kind"),
            ({"kind": "regurgitation"}, "other rows"),
        ]
    ):
        folder = write(tmp_path / str(number), scores, [{**lines[0], **change}, *lines[1:]])
        with pytest.raises(NekoLeanError, match=words):
            read_score(folder, EXAMPLES)
    folder = write(tmp_path / "cells", {**scores, "cells": {"forget.x.other": 0.5}}, lines)
    with pytest.raises(NekoLeanError, match="key cells"):
        read_score(folder)


def test_stored_scores_without_kind_and_document(tmp_path):
    """Older scores state neither; they follow from LUME's ids, and the numbers are the same."""
    lume = [("forget", row) for row in make_rows("Foo", 4)]
    lines = lines_of(half, lume)
    old = [{key: value for key, value in line.items() if key not in ("example_kind", "document")} for line in lines]
    stored = read_score(write(tmp_path / "old", scores_of(lines, lume), old), lume)
    assert intervals(estimates(stored["lines"])) == intervals(estimates(lines))
    spoilt = [{**old[0], "kind": "knowledge" if old[0]["kind"] == "regurgitation" else "regurgitation"}, *old[1:]]
    with pytest.raises(NekoLeanError, match="key kind"):
        read_score(write(tmp_path / "spoilt", {}, spoilt))

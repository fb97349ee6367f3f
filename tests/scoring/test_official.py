"""The official results against the official script's steps: a CSV file written and read back, and pandas' means."""

import io
import json
import random
from statistics import harmonic_mean

import pytest
from rouge_score.rouge_scorer import RougeScorer

from neko_lean.data.examples import Example, read_rows
from neko_lean.scoring.official import official_results
from neko_lean.scoring.task import CELLS, cell_means, example_score, missing_cells, task_aggregate
from tests.helpers import LUME, make_rows

pandas = pytest.importorskip("pandas")

WORDS = ["", "nan", "None", "NULL", "NaN", "N/A", "none", " ", "\n", "12", "3.50", "1e5", "inf", "True", "é ü 漢字 🙂"]
WORDS += ['say "hi", she said\nso', "'", ",", "\u00a0x", "<NA>", "n/a", "null "]


def generations(rows, seed):
    """Varied outputs: the true answer, similar ones, parts of it, and every word that a CSV file changes."""
    rng = random.Random(seed)
    said = []
    for row in rows:
        words = row.output.split()
        kinds = [
            row.output,
            row.output.upper(),
            f" {row.output}\n",
            row.output + ".",
            " ".join(words[: len(words) // 2]),
        ]
        kinds += [row.input, "".join(rng.sample(row.output, len(row.output)))]
        said.append(rng.choice([*kinds, rng.choice(WORDS)]))
    return said


def by_the_official_script(sets):
    """compute_metrics of evaluate_generations.py, step by step, with pandas and rouge_score."""
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    results, terms = {}, []
    for split, (rows, said) in sets.items():
        columns = {
            "id": [row.id for row in rows],
            "task": [row.task for row in rows],
            "expected_output": [row.output for row in rows],
            "model_output": said,
        }
        file = io.StringIO()
        pandas.DataFrame(columns).to_csv(file, index=False)
        file.seek(0)
        frame = pandas.read_csv(file)
        kinds = {"regurgitation-score": [], "knowledge-score": []}
        for name, truth, text in zip(frame["id"], frame["expected_output"], frame["model_output"], strict=True):
            recall = equal = None
            if name[:-1].endswith("sc"):
                recall = scorer.score(str(truth), str(text))["rougeL"].recall
            elif name[:-1].endswith("qa"):
                equal = float(str(truth).strip().lower() == str(text).strip().lower())
            kinds["regurgitation-score"].append(recall)
            kinds["knowledge-score"].append(equal)
        for kind, values in kinds.items():
            frame[kind] = pandas.Series(values, dtype=float)
        part = {f"overall-{kind}": frame[kind].mean() for kind in kinds}
        part |= frame.groupby("task")[list(kinds)].mean().to_dict(orient="index")
        results[f"{split}-set"] = part
        values = [value for task in part.values() if isinstance(task, dict) for value in task.values()]
        terms += [1 - value for value in values] if split == "forget" else values
    results["aggregated-terms"] = terms
    results["harmonic-mean-task-aggregate"] = harmonic_mean(terms)
    return results


def ours(sets):
    scored = {
        split: [(row, example_score(row, text)) for row, text in zip(rows, said, strict=True)]
        for split, (rows, said) in sets.items()
    }
    cells = cell_means(scored)
    scores = {"cells": cells, "task_aggregate": task_aggregate(cells), "membership": None, "mmlu": None, "final": None}
    return official_results(scores, scored)


def check(sets):
    wanted, got = by_the_official_script(sets), ours(sets)
    for name in ("forget-set", "retain-set"):
        assert list(got[name]) == list(wanted[name])
        for key, value in wanted[name].items():
            assert got[name][key] == pytest.approx(value, abs=1e-9, rel=0), (name, key)
    assert got["aggregated-terms"] == pytest.approx(wanted["aggregated-terms"], abs=1e-9, rel=0)
    assert got["harmonic-mean-task-aggregate"] == pytest.approx(wanted["harmonic-mean-task-aggregate"], abs=1e-9, rel=0)
    assert got["aggregate-score"] == -1 and "mmlu_average" not in got and json.dumps(got, allow_nan=False)


@pytest.mark.skipif(not LUME.is_dir(), reason="LUME's public splits are not available")
@pytest.mark.parametrize("seed", [0, 1])
def test_all_rows_of_lume_train(seed):
    sets = {split: read_rows(LUME, split, "train") for split in ("forget", "retain")}
    check({split: (rows, generations(rows, seed)) for split, rows in sets.items()})


@pytest.mark.parametrize("seed", range(20))
def test_words_that_a_csv_file_changes(seed):
    rng = random.Random(seed)
    sets = {}
    for split in ("forget", "retain"):
        rows = [Example(r.id, r.input, rng.choice([r.output, *WORDS[1:7], "12"]), r.task) for r in make_rows(split, 12)]
        sets[split] = rows, generations(rows, seed)
    check(sets)


def test_missing_task_has_no_aggregate():
    rows = make_rows("Foo", 2)
    sets = {"forget": [r for r in rows if r.task != "Task2"], "retain": rows}
    sets = {split: (some, generations(some, 0)) for split, some in sets.items()}
    got = ours(sets)
    assert got["harmonic-mean-task-aggregate"] is None and got["aggregate-score"] == -1
    assert got["aggregated-terms"].count(None) == 2 and len(got["aggregated-terms"]) == len(CELLS)
    cells = {f"{s}.{t}.{k}": got[f"{s}-set"][t][f"{k}-score"] for s, t, k in (cell.split(".") for cell in CELLS)}
    assert missing_cells(cells) == ["forget.Task2.regurgitation", "forget.Task2.knowledge"]


def test_final_score_needs_all_three_parts():
    rows = make_rows("Foo", 1)
    scored = {split: [(row, 0.5) for row in rows] for split in ("forget", "retain")}
    scores = {"cells": cell_means(scored), "task_aggregate": 0.5, "mmlu": {"micro": 0.25}, "final": 0.5}
    scores["membership"] = {"auc": 0.4, "score": 0.8}
    got = official_results(scores, scored)
    assert (got["mia_loss_acc"], got["mia_final_score"], got["mmlu_average"]) == (0.4, 0.8, 0.25)
    assert got["aggregate-score"] == 0.5

"""The bootstrap over documents: coverage, rows of a document, and paired differences."""

import numpy as np
import pytest

from neko_lean.data.examples import Example
from neko_lean.scoring.task import CELLS, task_aggregate
from neko_lean.scoring.uncertainty import contributions, differences, estimates, interval, intervals, mean_by_document


def line(split, task, document, kind, score, **numbers):
    name = {"sc": "regurgitation", "qa": "knowledge"}[kind]
    row_id = f"{document}-{kind}0"
    return {"split": split, "task": task, "kind": name, "id": row_id, "score": score, "numbers": numbers}


def lines(rng, documents=20, shift=0.0):
    found = []
    for split in ("forget", "retain"):
        for task in ("Task1", "Task2", "Task3"):
            for n in range(documents):
                value = float(np.clip(rng.random() + shift, 0, 1))
                for kind in ("sc", "qa"):
                    found.append(line(split, task, f"d{n}", kind, value, contained=value, answer_rank=1 + 9 * value))
    return found


def test_estimates_equal_plain_means():
    some = lines(np.random.default_rng(0))
    found = estimates(some)
    for cell in CELLS:
        split, task, name = cell.split(".")
        own = [x["score"] for x in some if (x["split"], x["task"], x["kind"]) == (split, task, name)]
        assert found[f"cells.{cell}"][0] == pytest.approx(np.mean(own), abs=1e-12)
    cells = {cell: found[f"cells.{cell}"][0] for cell in CELLS}
    assert found["task_aggregate"][0] == task_aggregate(cells)
    questions = [x for x in some if x["split"] == "forget" and x["kind"] == "knowledge"]
    wanted = np.exp(np.mean([np.log(x["numbers"]["answer_rank"]) for x in questions]))
    assert found["memorisation.forget.answer_rank"][0] == pytest.approx(wanted)
    assert found["leaks.forget.contained"][0] == pytest.approx(np.mean([x["numbers"]["contained"] for x in questions]))
    for key, ends in intervals(found).items():
        assert ends[0] <= found[key][0] <= ends[1], key


def test_each_resample_has_the_aggregate_of_its_cells():
    found = estimates(lines(np.random.default_rng(1), documents=4), num_resamples=50)
    for draw in range(50):
        cells = {cell: found[f"cells.{cell}"][1][draw] for cell in CELLS}
        assert found["task_aggregate"][1][draw] == pytest.approx(task_aggregate(cells))


def test_interval_coverage():
    """For documents with a true mean of 0.5, about 95 % of the intervals contain it."""
    covered = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        some = [line("forget", "Task1", f"d{n}", "qa", float(rng.random() < 0.5)) for n in range(60)]
        low, high = intervals(estimates(some, num_resamples=400))["cells.forget.Task1.knowledge"]
        covered += low <= 0.5 <= high
    assert 0.88 <= covered / 150 <= 1


def test_rows_of_a_document_are_resampled_together():
    """Ten documents of ten equal rows have the interval of ten observations, not of a hundred."""
    rng = np.random.default_rng(3)
    values = rng.random(10)
    alone = [line("forget", "Task2", f"d{n}", "qa", value) for n, value in enumerate(values)]
    many = [{**one, "id": f"{one['id']}{i}"} for one in alone for i in range(10)]
    many = [{**one, "id": one["id"].replace("-qa0", "-qa")} for one in many]
    key = "cells.forget.Task2.knowledge"
    assert intervals(estimates(many))[key] == pytest.approx(intervals(estimates(alone))[key])


def test_paired_difference_has_a_narrower_interval():
    before = lines(np.random.default_rng(5))
    after = [{**one, "score": one["score"] * 0.9} for one in before]
    found = differences(after, before)["cells.retain.Task1.knowledge"]
    one, two = (estimates(some)["cells.retain.Task1.knowledge"] for some in (after, before))
    assert found["difference"] == pytest.approx(one[0] - two[0])
    low, high = found["interval"]
    alone = intervals(estimates(after))["cells.retain.Task1.knowledge"]
    assert low <= found["difference"] <= high < 0 and (high - low) < 0.3 * (alone[1] - alone[0])
    same = differences(before, before)
    assert all(value == {"difference": 0.0, "interval": [0.0, 0.0]} for value in same.values())


def test_intervals_do_not_depend_on_the_order_of_rows():
    some = lines(np.random.default_rng(7), documents=5)
    one, two = intervals(estimates(some)), intervals(estimates(some[::-1]))
    assert one.keys() == two.keys() and all(one[key] == pytest.approx(two[key]) for key in one)


def test_numbers_only_count_for_their_kind_of_row():
    keys = [key for key, _ in contributions(line("retain", "Task1", "d", "sc", 1.0, contained=1.0, rouge_f1=0.5))]
    assert keys == ["cells.retain.Task1.regurgitation", "outputs.retain.rouge_f1"]
    keys = [key for key, _ in contributions(line("retain", "Task1", "d", "qa", 1.0, contained=1.0, rouge_f1=0.5))]
    assert keys == ["cells.retain.Task1.knowledge", "leaks.retain.contained"]


def test_missing_cells_and_rare_numbers():
    some = [one for one in lines(np.random.default_rng(8)) if one["task"] != "Task3"]
    some[0] = {**some[0], "numbers": {"truth_ratio": 0.5}}  # of a single document, which some resamples do not draw
    found = estimates(some)
    assert found["task_aggregate"][0] is None and "task_aggregate" not in intervals(found)
    assert intervals(found)["memorisation.forget.truth_ratio"] == [0.5, 0.5]
    assert interval(np.array([np.nan, np.nan])) is None


def test_mean_by_document():
    rows = [Example(f"d{n // 2}-qa{n % 2}", "", "", "") for n in range(40)]
    found = mean_by_document(rows, [float(n // 2 % 2) for n in range(40)])
    assert found["mean"] == 0.5 and 0.2 < found["interval"][0] < 0.5 < found["interval"][1] < 0.8
    assert mean_by_document([], []) == {"mean": None, "interval": None}

"""The table of the sampling attack: every k and cell, for scores that have the attack and others that do not."""

from neko_lean.reporting.benchmark_tables import sampling_table
from neko_lean.reporting.figures import Model
from tests.reporting.made import full_scores, leak_point, old_scores


def test_leaks_by_cell_and_number_of_samples():
    scores = full_scores("m", 0.4)
    scores["attacks"]["sample"] = [leak_point(n, n / 20) for n in (0, 1, 16)]
    scores["attacks"]["sample"][2]["cells"]["forget.Task1.knowledge"] |= {"value": 1.0, "interval": [0.9, 1.0]}
    table = sampling_table([Model(1, "m", scores, {}, []), Model(2, "old", old_scores("old", 0.4), {}, [])])

    assert table is not None and len(table.groups) == 7
    groups = {group.title: group.lines for group in table.groups}
    lines = groups["Forget set: all rows"]
    assert [line.name for line in lines] == ["greedy", "leak@1", "leak@16"]
    assert [line.cells[0].value for line in lines] == ["0.000", "0.050", "0.800"]
    assert lines[2].cells[0].small == ["0.75 to 0.85"] and lines[2].cells[1].missing
    cell = groups["Forget set: questions about Task1"][2].cells[0]
    assert (cell.value, cell.small) == ("1.000", ["0.90 to 1.00"])


def test_no_table_without_the_attack():
    assert sampling_table([Model(1, "old", old_scores("old", 0.4), {}, [])]) is None
    damaged = {"attacks": {"sample": [{"samples": 4, "leak": "x", "cells": 3}, 7]}}
    assert sampling_table([Model(1, "damaged", damaged, {}, [])]) is None

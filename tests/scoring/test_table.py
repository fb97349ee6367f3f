"""The table of one score, of several side by side, and of one beside the model before."""

from rich.console import Console

from neko_lean.scoring.results import main_differences
from neko_lean.scoring.table import score_table
from tests.reporting.made import full_scores, leak_point


def printed(named, width=80):
    console = Console(width=width, no_color=True, legacy_windows=False)
    with console.capture() as capture:
        console.print(score_table(named))
    return capture.get()


def row(text, label):
    """The columns of the row that starts with this label."""
    (line,) = [line for line in text.replace("┃", "│").splitlines() if line.startswith(f"│ {label} ")]
    return [column.strip() for column in line.strip("│").split("│")]


def after_and_before():
    before, after = full_scores("target", 1.0), full_scores("unlearned", 0.02, seed=1)
    for scores in (before, after):
        scores["outputs"] = {split: {"degenerate_text": 0.0} for split in ("forget", "retain")}
        scores["verdict"] = []
    after["difference"] |= main_differences(after, before)
    return after, before


def test_a_score_that_knows_the_model_before_has_before_after_and_change():
    after, before = after_and_before()
    text = printed({"score": after})
    assert row(text, "  ")[1:] == ["before", "after", "change (95 % interval)"]
    cell = f"{after['cells']['forget.Task1.knowledge']:.3f}"
    assert row(text, "forget Task1 knowledge")[2:] == [cell, "-0.980 (-1.08 to -0.88)"]
    assert row(text, "membership AUC, loss") == [
        "membership AUC, loss", f"{before['membership']['auc']:.3f}", f"{after['membership']['auc']:.3f}", "-0.490"
    ]  # fmt: skip
    assert row(text, "MMLU")[1:] == ["0.310", "0.310", "+0.000"]
    assert row(text, "retain Task1 knowledge")[1] == row(text, "retain Task1 knowledge")[3] == ""  # not known
    assert "not measured" not in text and max(map(len, text.splitlines())) <= 80


def test_the_strongest_attack_has_a_row():
    after, before = after_and_before()
    for table in (after, before):
        table["membership"]["attacks"]["all"]["zlib"]["auc"] = 0.97
    after["difference"] = None
    assert "strongest membership attack: zlib" in printed({"score": after}, 120)
    assert "0.970 zlib" in printed({"before": before, "after": after}, 120)


def test_leaks_of_the_sampling_attack_have_rows():
    after, before = after_and_before()
    after["attacks"]["sample"] = [leak_point(k, k / 20) for k in (0, 1, 16)]
    before["attacks"].pop("sample")
    alone = printed({"score": {**after, "difference": None}}, 120)
    assert row(alone, "leaked forget rows, greedy")[1] == "0.000 (0.00 to 0.05)"
    assert row(alone, "leaked forget rows, leak@16")[1] == "0.800 (0.75 to 0.85)"
    assert row(printed({"score": after}), "leaked forget rows, leak@1")[1:] == ["", "0.050", ""]
    assert row(printed({"before": before, "after": after}, 120), "leaked forget rows, leak@1")[1:] == [
        "not measured", "0.050"
    ]  # fmt: skip
    assert "leaked forget rows" not in printed({"before": before}, 120)


def test_several_scores_are_side_by_side_without_changes():
    after, before = after_and_before()
    text = printed({"before": before, "after": after})
    assert row(text, "forget Task1 knowledge")[1:] == [
        f"{scores['cells']['forget.Task1.knowledge']:.3f}" for scores in (before, after)
    ]
    assert "change" not in text

"""Matching scores with runs, finding the scores before unlearning, and refused folders."""

import json
import shutil

import pytest

from neko_lean.errors import NekoLeanError
from neko_lean.reporting.collect import collect
from tests.reporting.made import full_scores, make_demo, old_scores, write_run, write_scores


def summarize(collected):
    """The collected folders as (before, [(label, folder, run)])."""
    before = collected.before.folder.name if collected.before else None
    return before, [(one.label, one.folder.name, one.run.folder.name if one.run else None) for one in collected.after]


def test_demo_folder(tmp_path):
    before, after = summarize(collect([make_demo(tmp_path / "demo")]))
    assert before == "scores-before"
    assert after == [
        ("calibrated", "scores-calibrated", "unlearned-calibrated"),
        ("neko", "scores-neko", "unlearned-neko"),
    ]


def test_folders_in_any_order_are_matched_by_model(tmp_path):
    demo = make_demo(tmp_path / "demo")
    named = [demo / name for name in ("unlearned-neko", "scores-neko", "scores-before")]
    assert summarize(collect(named)) == ("scores-before", [("neko", "scores-neko", "unlearned-neko")])
    # Without runs the scores' own difference says what they were compared with.
    assert summarize(collect(named[1:])) == ("scores-before", [("unlearned-neko", "scores-neko", None)])


def test_scores_without_runs(tmp_path):
    one = write_scores(tmp_path / "one", old_scores("a", 1.0))
    two = write_scores(tmp_path / "two", old_scores("b", 0.1))
    assert summarize(collect([one, two])) == ("one", [("b", "two", None)])
    assert summarize(collect([one])) == (None, [("a", "one", None)])
    assert summarize(collect([one, two], before=two)) == ("two", [("a", "one", None)])
    assert summarize(collect([one], before=two)) == ("two", [("a", "one", None)])


def test_renamed_folders_are_paired_if_unambiguous_or_named(tmp_path):
    before = write_scores(tmp_path / "b", old_scores("target", 1.0))
    scores = [write_scores(tmp_path / f"s{n}", old_scores("moved", 0.1)) for n in range(2)]
    runs = [write_run(tmp_path / f"r{n}", "target", "calibrated") for n in range(2)]
    assert summarize(collect([before, scores[0], runs[0]])) == ("b", [("calibrated", "s0", "r0")])
    with pytest.raises(NekoLeanError, match="SCORES=RUN"):
        collect([before, *scores, *runs])
    paired = collect([before, *(f"{s}={r}" for s, r in zip(scores, reversed(runs), strict=True))])
    assert summarize(paired) == ("b", [("calibrated, s0", "s0", "r1"), ("calibrated, s1", "s1", "r0")])


def test_runs_without_scores_inside_a_folder_are_ignored(tmp_path):
    demo = make_demo(tmp_path / "demo")
    shutil.rmtree(demo / "scores-neko")
    (demo / "demo.json").unlink()
    assert summarize(collect([demo])) == (
        "scores-before",
        [("calibrated", "scores-calibrated", "unlearned-calibrated")],
    )


def test_labels_differ(tmp_path):
    folders = [write_scores(tmp_path / str(n) / "s", old_scores(name, 0.5)) for n, name in enumerate("axxx")]
    labels = [one.label for one in collect(folders).all]
    assert labels == ["before", "x, s, 1", "x, s, 2", "x, s, 3"]


def test_missing_generations_are_no_error(tmp_path):
    folder = write_scores(tmp_path / "s", old_scores("a", 1.0))
    (folder / "generations.jsonl").unlink()
    assert collect([folder]).after[0].rows == []


def test_lone_surrogates_are_replaced(tmp_path):
    folder = write_scores(tmp_path / "s", full_scores("a\ud800", 1.0))
    assert collect([folder]).after[0].label == "a?"


def test_invalid_folders(tmp_path):
    run = write_run(tmp_path / "run", "target", "neko")
    (tmp_path / "empty").mkdir()
    broken = write_scores(tmp_path / "broken", old_scores("a", 1.0))
    (broken / "scores.json").write_text("{")
    listed = write_scores(tmp_path / "listed", old_scores("a", 1.0))
    (listed / "scores.json").write_text(json.dumps([1]))
    deep = write_scores(tmp_path / "deep", old_scores("a", 1.0))
    (deep / "scores.json").write_text("[" * 100_000)
    lines = write_scores(tmp_path / "lines", old_scores("a", 1.0))
    (lines / "generations.jsonl").write_text("{}\n[")
    for given, words in (
        ([tmp_path / "none"], "is not a folder"),
        ([tmp_path / "empty"], "neither scores.json nor run.json"),
        ([run], "no scores among them"),
        ([broken], "is not JSON"),
        ([listed], "no JSON object"),
        ([deep], "is not JSON"),
        ([lines], "line 2"),
        ([f"{lines}={tmp_path / 'empty'}"], "run.json"),
    ):
        with pytest.raises(NekoLeanError, match=words):
            collect(given)
    with pytest.raises(NekoLeanError, match="--before"):
        collect([write_scores(tmp_path / "s", old_scores("a", 1.0))], before=run)

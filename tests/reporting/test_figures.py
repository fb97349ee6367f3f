"""The report's charts: every model is drawn, or a sentence says why not."""

from neko_lean.reporting.figures import (
    Model,
    attack_figures,
    cell_figures,
    interval_note,
    letter_figure,
    roc_figure,
    training_figures,
    training_notes,
)
from tests.reporting.made import full_scores, old_scores

STEPS = [{"step": step, "forget_loss": 1.0 / step, "retain_loss": 0.1} for step in (1, 2, 3)]


def test_models_without_curves_are_named_with_the_reason():
    models = [
        Model(0, "before", {}, {"command": "memorize"}, []),
        Model(1, "short", {}, {"command": "unlearn"}, STEPS),
        Model(2, "other", {}, {}, []),
        Model(3, "gold", {}, {}, []),
        Model(4, "lost", {}, {"command": "unlearn"}, []),
    ]
    assert training_notes(models) == [
        "No curves for before: it was trained by memorizing, not by unlearning.",
        "No curves for other and gold: no run folder was given.",
        "No curves for lost: the run folder has no log of its steps.",
        "These runs did not evaluate a sample while they trained, so there are no curves of answers.",
    ]
    figures = training_figures(models)
    assert [figure.title for figure in figures] == ["Forget loss", "Retain loss"]
    assert all(figure.svg.count('class="dot c1"') == len(STEPS) and figure.absent == "" for figure in figures)


def test_a_single_evaluation_beside_a_long_run_is_visible():
    long = [{"step": step, "eval_retain_kl": 0.1, "forget_loss": 1.0} for step in range(1, 100)]
    one = [{"step": 1, "forget_loss": 1.0}, {"step": 2, "eval_retain_kl": 0.2}]
    models = [Model(1, "long", {}, {}, long), Model(2, "one", {}, {}, one), Model(3, "none", {}, {}, STEPS)]
    kl = next(figure for figure in training_figures(models) if figure.title.startswith("KL"))
    assert kl.svg.count('class="dot c2"') == 1 and kl.absent == "Not measured for none."
    assert training_notes(models) == []


def test_scores_without_intervals_are_named():
    models = [Model(1, "new", full_scores("new", 0.4), {}, []), Model(2, "old", old_scores("old", 0.4), {}, [])]
    assert interval_note(models) == "No intervals for old: the scores have none."
    assert interval_note(models[:1]) == ""


def test_models_without_a_measurement_are_named_below_the_chart():
    models = [Model(1, "new", full_scores("new", 0.4), {}, []), Model(2, "old", old_scores("old", 0.4), {}, [])]
    figures = [roc_figure(models), letter_figure(models), *attack_figures(models)]
    assert len(figures) == 13 and {figure.absent for figure in figures} == {"Not measured for old."}
    assert {figure.absent for figure in cell_figures(models)} == {""}


def test_axes_are_in_words():
    figures = {figure.title: figure.svg for figure in attack_figures([Model(1, "m", full_scores("m", 0.4), {}, [])])}
    paraphrase = figures["Paraphrased prompts"]
    assert all(f">{words}<" in paraphrase for words in ("prompt", "original", "paraphrased"))


def test_relearning_has_a_chart_of_the_loss_of_answers():
    scores = full_scores("m", 0.4)
    (figure,) = [figure for figure in attack_figures([Model(1, "m", scores, {}, [])]) if "nats a token" in figure.svg]
    assert figure.title == "Relearning" and figure.svg.count('class="dot c1"') == 3
    for point in scores["attacks"]["relearn"]:
        del point["answer_nll"]  # as in scores of earlier versions
    assert not any("nats" in figure.svg for figure in attack_figures([Model(1, "m", scores, {}, [])]))


def test_the_sampling_attack_is_drawn_by_shares_that_leak():
    scores = full_scores("m", 0.4)
    for point in scores["attacks"]["sample"]:
        point |= {"knowledge": 1.0, "regurgitation_leak": None}  # not what is drawn, and not measured
    figures = [figure for figure in attack_figures([Model(1, "m", scores, {}, [])]) if figure.title == "Sampling"]
    assert [figure.note for figure in figures] == ["forget set, questions"]
    assert "share that leaks in any sample" in figures[0].svg and "samples (0: greedy)" in figures[0].svg
    assert figures[0].svg.count('class="dot c1"') == 6

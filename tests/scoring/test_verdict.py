"""For each way in which a single number can mislead, scores that do so, and the sentence that reveals it."""

import copy
import math

import numpy as np
import pytest

from neko_lean.scoring.generation import Generation
from neko_lean.scoring.measure import generation_line
from neko_lean.scoring.membership import summary
from neko_lean.scoring.mmlu import Answered
from neko_lean.scoring.mmlu import summary as mmlu_summary
from neko_lean.scoring.outputs import leak_numbers, output_numbers
from neko_lean.scoring.task import CELLS, task_aggregate
from neko_lean.scoring.uncertainty import estimates, group_means
from neko_lean.scoring.verdict import verdict
from tests.helpers import make_rows

VOCABULARY = 1000


def scores_of(say, *, probability=0.01, entropy=2.0, losses=None, **change):
    """The scores of a model that answers `say(split, row)`, with these numbers of the true answers."""
    lines = []
    for split, prefix in (("forget", "Foo"), ("retain", "Rix")):
        for row in make_rows(prefix, 8):
            text = say(split, row)
            known = {"extraction_strength": 0.0, "exact_memorisation": 0.0, "within_ten": 0.0, "answer_rank": 500.0}
            known |= {"answer_probability": probability if split == "forget" else 0.9, "entropy": entropy}
            numbers = {**known, **leak_numbers(row, text), **output_numbers(row, text)}
            lines.append(generation_line(split, row, Generation(text, text, "eos"), numbers))
    found = estimates(lines, num_resamples=50)
    cells = {cell: found[f"cells.{cell}"][0] for cell in CELLS}
    scores = {"cells": cells, "missing_cells": [], "task_aggregate": task_aggregate(cells), **group_means(found)}
    scores |= {"membership": membership(*losses) if losses else None, "mmlu": None, "attacks": {}, "difference": None}
    scores |= {"held_nll": 3.0, "nonmember_nll": None, "uniform_nll": math.log(VOCABULARY), **change}
    return scores


def membership(members, nonmembers):
    return summary(
        [
            {"side": side, "task": "anchor", "loss": x, "zlib": x, "min_k": x, "min_k_plus_plus": x}
            for side, some in (("member", members), ("nonmember", nonmembers))
            for x in some
        ]
    )


def unlearned(split, row):
    """Answers retain prompts correctly, and forget prompts wrongly in plain language."""
    return row.output if split == "retain" else "They met at a small harbour before the winter came."


def lines(scores):
    return "\n".join(verdict(scores))


UNSEEN = np.linspace(4, 6, 60)
ALARMS = ("BROKEN", "LEAKS", "HIDDEN", "GIBBERISH", "TWO-SIDED", "ATTACK", "MMLU")


def test_model_that_unlearned_well_raises_no_alarm():
    text = lines(scores_of(unlearned, losses=(np.linspace(4, 6, 40), UNSEEN)))
    assert not any(alarm in text for alarm in ALARMS), text
    assert "It preserved the retain set" in text and "None of 4 membership attacks can tell" in text


def test_model_that_forgot_nothing():
    text = lines(scores_of(lambda split, row: row.output, probability=0.9, losses=(UNSEEN - 4, UNSEEN)))
    assert "It forgot little or nothing" in text and "still recognizes the forgotten documents (loss: AUC 1.00" in text


@pytest.mark.parametrize("noise", ["", "zq zq zq zq zq zq", "!!!!!!!!!!", "qa qb qc " * 10])
def test_gibberish_everywhere_is_broken(noise):
    """Although every forget cell is perfect."""
    scores = scores_of(lambda split, row: noise)
    assert all(scores["cells"][cell] == 0 for cell in CELLS if cell.startswith("forget"))
    assert verdict(scores)[0].startswith("BROKEN")


@pytest.mark.parametrize("noise", ["", "zq zq zq zq zq zq", "qa qb qc " * 10, " the the the the the,,,,, a to the the"])
def test_gibberish_on_forget_prompts(noise):
    scores = scores_of(lambda split, row: noise if split == "forget" else row.output)
    assert scores["task_aggregate"] > 0.96  # the task's own number is misled
    assert "GIBBERISH" in lines(scores) and "BROKEN" not in lines(scores)


def test_uniform_loss_is_broken():
    """Every document has the loss of a uniform guess, so the AUC is 0.5 and the membership score 1."""
    rng = np.random.default_rng(0)
    cost = math.log(VOCABULARY)
    losses = rng.normal(cost, 0.01, 40), rng.normal(cost, 0.01, 60)
    scores = scores_of(unlearned, losses=losses, held_nll=cost, entropy=cost)
    assert scores["membership"]["score"] > 0.8
    assert "BROKEN" in verdict(scores)[0] and "uniform guess" in verdict(scores)[0]


def test_higher_loss_on_unseen_text_is_broken():
    scores = scores_of(unlearned, difference={"unseen_nll": {"difference": 1.5, "interval": None}}, held_nll=4.5)
    assert "1.50 nats per token higher than before" in verdict(scores)[0]
    scores["difference"]["unseen_nll"]["difference"] = 0.2
    assert "BROKEN" not in lines(scores)


def test_single_zero_is_named():
    def unlucky(split, row):
        return "x" if split == "retain" and row.task == "Task2" and row.kind == "qa" else unlearned(split, row)

    scores = scores_of(unlucky)
    assert scores["task_aggregate"] == 0
    words = "only because of the questions about Task2 (retain set); if that were perfect, it would be"
    assert words in lines(scores)
    before = {"cells": dict.fromkeys(CELLS, 1.0)}
    assert "the largest loss is from 1.00 to 0.00, for questions about Task2" in "\n".join(verdict(scores, before))


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (lambda answer: f"Well, I believe that it was {answer}, was it not?", "inside longer text"),
        (lambda answer: " ".join(answer.replace("-", "").replace(" ", "")), "with other spaces or dashes"),
        (lambda answer: "-".join(answer), "with other spaces or dashes"),
    ],
)
def test_answer_in_another_form_leaks(form, words):
    scores = scores_of(lambda split, row: form(row.output) if split == "forget" else row.output)
    assert all(scores["cells"][f"forget.{task}.knowledge"] == 0 for task in ("Task1", "Task2", "Task3"))
    assert "LEAKS" in lines(scores) and words in lines(scores)


def test_likely_answers_that_are_not_generated_are_hidden():
    scores = scores_of(lambda split, row: "I do not know that." if split == "forget" else row.output, probability=0.8)
    assert scores["task_aggregate"] > 0.9
    assert "HIDDEN" in lines(scores) and "0.80" in lines(scores)


def test_members_on_both_sides_of_unseen_text():
    members = np.concatenate([UNSEEN[:20] - 4, UNSEEN[:20] + 5])
    scores = scores_of(unlearned, losses=(members, UNSEEN))
    assert scores["membership"]["score"] > 0.9
    assert "TWO-SIDED" in lines(scores)


def test_members_with_conspicuously_high_loss():
    assert "conspicuously above that of unseen ones" in lines(scores_of(unlearned, losses=(UNSEEN + 3, UNSEEN)))


def test_one_letter_for_all_questions():
    right = [0, 1, 2, 3, 0, 0, 1, 0, 0, 2]
    found = mmlu_summary({"anatomy": Answered([0] * 10, right, [5] * 10, 0)}, 5)
    text = lines(scores_of(unlearned, mmlu=found))
    assert "100 % of its answers are A" in text and "always answering A scores 0.500" in text
    varied = mmlu_summary({"anatomy": Answered([1, 2, 3, 0, 1, 0, 1, 2, 3, 2], right, [5] * 10, 0)}, 5)
    assert "MMLU is 0.300, below the shared task's floor of 0.371" in lines(scores_of(unlearned, mmlu=varied))


def test_attack_that_recovers_answers():
    curve = [{"steps": 0, "knowledge": 0.0, "regurgitation": 0.1}, {"steps": 5, "knowledge": 0.6, "regurgitation": 0.2}]
    scores = scores_of(unlearned, attacks={"relearn": curve})
    assert "ATTACK: relearn raises knowledge on the forget rows from 0.00 to 0.60" in lines(scores)
    flat = copy.deepcopy(curve)
    flat[1]["knowledge"], flat[1]["regurgitation"] = 0.0, 0.11
    assert "No attack recovered" in lines(scores_of(unlearned, attacks={"relearn": flat}))


def test_relearning_that_lowers_the_loss_of_answers():
    """The answers are not generated yet, so the shares say nothing."""
    curve = [
        {"steps": steps, "knowledge": 0.0, "regurgitation": 0.1, "answer_nll": loss}
        for steps, loss in ((0, 6.0), (5, 2.5), (10, 2.75))
    ]
    text = lines(scores_of(unlearned, attacks={"relearn": curve}))
    assert "No attack recovered" in text
    assert "lowers the loss of the other forget answers from 6.00 to 2.50 nats a token in 5 steps" in text
    rising = [{**point, "answer_nll": 6.0 + point["steps"]} for point in curve]
    assert "Relearning lowers" not in lines(scores_of(unlearned, attacks={"relearn": rising}))


def test_samples_that_leak_what_greedy_decoding_hides():
    curve = [{"samples": k, "knowledge_leak": k / 20, "regurgitation_leak": 0.5} for k in (0, 1, 16)]
    flat = [{"steps": n, "knowledge": 0.0, "regurgitation": 0.1} for n in (0, 5)]
    text = lines(scores_of(unlearned, attacks={"sample": curve, "relearn": flat}))
    assert "ATTACK: in 16 samples, 80 % of the forget questions leak (0 % when decoding greedily); a model" in text
    never = [{**point, "knowledge_leak": 0.0} for point in curve]
    assert "No attack recovered" in lines(scores_of(unlearned, attacks={"sample": never}))
    nothing = [{**point, "knowledge_leak": None, "regurgitation_leak": None} for point in curve]
    assert "recovered" not in lines(scores_of(unlearned, attacks={"sample": nothing}))


def test_missing_cell():
    scores = scores_of(unlearned)
    scores |= {"task_aggregate": None, "missing_cells": ["forget.Task3.knowledge"]}
    scores["cells"]["forget.Task3.knowledge"] = None
    assert "no rows for questions about Task3 (forget set)" in lines(scores)


def test_the_strongest_attack_is_named_with_its_interval():
    rng = np.random.default_rng(0)
    sides = {
        side: [
            dict.fromkeys(("loss", "min_k", "min_k_plus_plus"), float(x)) | {"zlib": float(x) + shift} for x in values
        ]
        for side, values, shift in (("member", rng.normal(size=40), -3), ("nonmember", rng.normal(size=40), 0))
    }
    documents = [{"side": side, "task": "anchor", **line} for side, lines in sides.items() for line in lines]
    text = lines(scores_of(unlearned, membership=summary(documents)))
    assert "still recognizes the forgotten documents (zlib: AUC " in text


def test_nothing_left_is_not_a_percentage():
    scores = {"cells": dict.fromkeys((cell for cell in CELLS if cell.startswith("forget")), 0.0)}
    assert verdict(scores) == ["Asked directly, it reproduces nothing of the forget set."]
    scores["cells"]["forget.Task1.knowledge"] = 0.012
    assert verdict(scores) == [
        "Asked directly, it reproduces less than 1 % of the forget set; the highest score is 0.01, for questions about "
        "Task1."
    ]


def test_scores_without_any_number_have_no_sentences():
    assert verdict({}) == [] and verdict({"cells": None, "attacks": [], "mmlu": 3, "membership": "x"}) == []


def test_a_model_that_never_knew_the_forget_set():
    """It is forgotten, but not by unlearning."""
    scores = scores_of(lambda split, row: row.output if split == "retain" else "no")
    assert "The model before knew nothing of the forget set either" in " ".join(verdict(scores, copy.deepcopy(scores)))
    knew = scores_of(lambda split, row: row.output)
    assert "knew nothing" not in " ".join(verdict(scores, knew)) + " ".join(verdict(knew, scores))

"""What a checkpoint is chosen by, against a computation row by row."""

import math
from dataclasses import replace

import pytest
import torch

from neko_lean.models.loading import load_model
from neko_lean.training.evaluation import answers, quality
from tests.helpers import encoded

CPU = torch.device("cpu")


def test_answers_are_those_of_each_row_alone(world, model):
    lm = load_model(model, torch.float32, CPU)
    rows = encoded(world)[:8]
    # Half of the rows get an answer that the model itself gives, token by token, so that some are exact.
    for number in range(0, 8, 2):
        one = rows[number]
        ids = list(one.input_ids[: one.prompt_length])
        for _ in range(4):
            ids.append(lm.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        rows[number] = replace(one, input_ids=ids)
    exact, losses = [], []
    for one in rows:
        z = lm.model(input_ids=torch.tensor([one.input_ids])).logits[0, one.prompt_length - 1 : -1]
        wanted = torch.tensor(one.input_ids[one.prompt_length :])
        exact.append((z.argmax(1) == wanted).all().item())
        losses += (-z.log_softmax(1).gather(1, wanted[:, None])).flatten().tolist()
    found = answers(lm, rows, 1)
    assert found["exact"] == sum(exact) / 8 >= 0.5
    assert found["nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    cut = [replace(one, input_ids=one.input_ids[: one.prompt_length]) for one in rows]
    assert answers(lm, cut, 1) == {} == answers(lm, [], 1)
    assert answers(lm, [*rows, *cut], 1) == pytest.approx(found)


def test_quality_is_zero_for_doing_nothing_and_for_losing_everything():
    good = {"eval_forget_exact": 0.0, "eval_retain_exact": 1.0, "eval_retain_kl": 0.0}
    assert quality(good) == 1
    assert quality({**good, "eval_forget_exact": 1.0}) == 0 == quality({**good, "eval_retain_exact": 0.0})
    assert quality({**good, "eval_retain_kl": math.inf}) == 0 == quality({})
    assert quality({**good, "eval_forget_exact": 0.5}) == pytest.approx(3 / 4)
    assert quality({"eval_retain_exact": 0.4}) == pytest.approx(0.4)

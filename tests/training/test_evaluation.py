"""Metrics by which a checkpoint is chosen, compared with a computation example by example."""

import math
from dataclasses import replace

import pytest
import torch

from neko_lean.models.loading import load_model
from neko_lean.training.evaluation import answer_metrics, quality
from tests.helpers import encoded

CPU = torch.device("cpu")


def test_answer_metrics_equal_those_of_each_example_alone(world, model):
    lm = load_model(model, torch.float32, CPU)
    examples = encoded(world)[:8]
    # Half of the examples get the model's own greedy answer, so that some are exact.
    for number in range(0, 8, 2):
        example = examples[number]
        ids = list(example.input_ids[: example.prompt_length])
        for _ in range(4):
            ids.append(lm.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        examples[number] = replace(example, input_ids=ids)
    exact, losses = [], []
    for example in examples:
        logits = lm.model(input_ids=torch.tensor([example.input_ids])).logits[0, example.prompt_length - 1 : -1]
        target = torch.tensor(example.input_ids[example.prompt_length :])
        exact.append((logits.argmax(1) == target).all().item())
        losses += (-logits.log_softmax(1).gather(1, target[:, None])).flatten().tolist()
    metrics = answer_metrics(lm, examples, 1)
    assert metrics["exact"] == sum(exact) / 8 >= 0.5
    assert metrics["nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    truncated = [replace(example, input_ids=example.input_ids[: example.prompt_length]) for example in examples]
    assert answer_metrics(lm, truncated, 1) == {} == answer_metrics(lm, [], 1)
    assert answer_metrics(lm, [*examples, *truncated], 1) == pytest.approx(metrics)


def test_quality_is_zero_without_forgetting_and_without_retained_answers():
    good = {"eval_forget_exact": 0.0, "eval_retain_exact": 1.0, "eval_retain_kl": 0.0}
    assert quality(good) == 1
    assert quality({**good, "eval_forget_exact": 1.0}) == 0 == quality({**good, "eval_retain_exact": 0.0})
    assert quality({**good, "eval_retain_kl": math.inf}) == 0 == quality({})
    assert quality({**good, "eval_forget_exact": 0.5}) == pytest.approx(3 / 4)
    assert quality({"eval_retain_exact": 0.4}) == pytest.approx(0.4)

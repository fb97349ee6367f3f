"""Overrides of a short run with evaluations, and access to what a run writes."""

import json

import torch

from neko_lean.models.loading import load_model

FAST = {"max_steps": 6, "forget_rows": 8, "retain_rows": 8, "eval_every": 2, "eval_rows": 4, "lr": 1e-3}


def metrics(folder):
    """Lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    """Weights of a checkpoint in bfloat16, by name."""
    return load_model(folder, torch.bfloat16, torch.device("cpu")).model.state_dict()


def equal_weights(actual, expected):
    """Whether two checkpoints have the same weights."""
    return all(torch.equal(actual[name], expected[name]) for name in actual)

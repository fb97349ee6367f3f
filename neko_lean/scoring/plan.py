"""What a score is computed from: the plan that a resumed run must match, and the digest that identifies a result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from neko_lean.data import PromptFormat
from neko_lean.models import identify, stated_eos_token_id
from neko_lean.options import ScoreInputs, ScoreSettings
from neko_lean.outputs import MANIFEST, file_sha256
from neko_lean.scoring.inputs import ScoreData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_plan(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    data: ScoreData,
    prompts: PromptFormat,
    max_new_tokens: int,
    dtype: str,
) -> dict[str, Any]:
    """Everything that the generations depend on; an interrupted run is resumed only with the same plan."""
    identity = identify(folder, tokenizer)
    return {
        "model": identity.weights,
        "tokenizer": identity.tokenizer,
        "config": identity.config,
        "rows": [f"{split} {example.digest}" for split, example in data.examples],
        "format": prompts.name,
        "benchmark": None if data.benchmark is None else [data.benchmark.name, data.benchmark.split],
        "max_new_tokens": max_new_tokens,
        "dtype": dtype,
        "eos_token_id": stated_eos_token_id(folder),
    }


def digest_of_run(
    plan: Mapping[str, Any], data: ScoreData, inputs: ScoreInputs, settings: ScoreSettings, device: torch.device
) -> str:
    """SHA-256 of everything that the scores depend on: `made_from` in scores.json."""
    options = {
        "mia": digest(data.documents),
        "held": digest(data.held_out),
        "paraphrases": digest(data.paraphrases),
        "mmlu": digest(data.subjects),
        "reference": None if inputs.reference is None else file_sha256(Path(inputs.reference) / MANIFEST),
        "before": None if data.before is None else digest(data.before),
        "benchmark": digest(data.benchmark),
        "shots": settings.shots,
        "lm_eval": list(settings.lm_eval),
        "attacks": sorted(settings.attacks),
        "relearn_lr": settings.relearn_lr,
        "seed": settings.seed,
        "device": device.type,
    }
    return hashlib.sha256(json.dumps([plan, options], sort_keys=True).encode()).hexdigest()


def digest(value: object) -> str:
    """SHA-256 of data read from a file: documents, paraphrases, questions or scores."""
    return hashlib.sha256(repr(value).encode("utf-8", "surrogatepass")).hexdigest()

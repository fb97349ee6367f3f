"""Predict the peak memory of a run from a model's config, and compare it with training next to a live teacher."""

from neko_lean.memory.estimate import ADAM_STATE, CONTEXT, LINES, PREDICTABLE_CPU_PEAK, STUDENT, MemoryEstimate
from neko_lean.memory.planning import plan
from neko_lean.memory.prediction import predict, predicted_peak
from neko_lean.memory.step_time import GPUS
from neko_lean.memory.two_models import TWO_MODEL_BASELINES, TwoModelBaseline, two_model_loss

__all__ = [
    "ADAM_STATE",
    "CONTEXT",
    "GPUS",
    "LINES",
    "PREDICTABLE_CPU_PEAK",
    "STUDENT",
    "TWO_MODEL_BASELINES",
    "MemoryEstimate",
    "TwoModelBaseline",
    "plan",
    "predict",
    "predicted_peak",
    "two_model_loss",
]

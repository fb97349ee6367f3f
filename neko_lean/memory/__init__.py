"""Predict the peak memory of a run from a config alone, and compare with two models."""

from neko_lean.memory.plan import plan_run
from neko_lean.memory.prediction import CONTEXT, predicted_peak
from neko_lean.memory.two_models import TWO_MODEL_BASELINES, TwoModelBaseline, two_model_loss

__all__ = ["CONTEXT", "TWO_MODEL_BASELINES", "TwoModelBaseline", "plan_run", "predicted_peak", "two_model_loss"]

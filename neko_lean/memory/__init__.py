"""Predict the peak memory of a run from a config alone, and compare with two models."""

from neko_lean.memory.plan import plan_run
from neko_lean.memory.prediction import CONTEXT, predicted_peak
from neko_lean.memory.two_models import WAYS, Way, two_model_loss

__all__ = ["CONTEXT", "WAYS", "Way", "plan_run", "predicted_peak", "two_model_loss"]

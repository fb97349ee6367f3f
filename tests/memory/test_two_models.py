"""The two-model baselines."""

from neko_lean.memory.largest_step import largest_step
from neko_lean.memory.prediction import predict
from neko_lean.memory.two_models import LEAN_BASELINE, PUBLISHED_BASELINE, predict_two_models
from neko_lean.recipe import load_recipe
from tests.memory.configs import MIDDLE


def test_a_baseline_holds_two_models():
    recipe = load_recipe("neko")
    parameters = predict(MIDDLE, recipe, largest_step(recipe)).lines["student weights"] // 2
    for baseline, size in ((LEAN_BASELINE, 2), (PUBLISHED_BASELINE, 4)):
        estimate = predict_two_models(MIDDLE, baseline, 32, 128)
        assert estimate.lines["student weights"] == estimate.lines["teacher weights"] == size * parameters
        assert estimate.lines["Adam state"] == 2 * size * parameters
        # The float32 logits of 32 examples are alive at least three times.
        assert estimate.peak - 4 * size * parameters > 3 * 32 * 128 * 3000 * 4
        assert estimate.peak == sum(estimate.lines.values())


def test_a_baseline_has_no_estimate_for_a_cpu():
    assert predict_two_models(MIDDLE, LEAN_BASELINE, 4, 128).cpu_peak is None

"""The quantization attack on a model that has memorised the forget set."""

import pytest
import torch

from neko_lean.models.loading import load_model
from neko_lean.scoring.attacks.quantize import quantize, round_trip


@pytest.mark.slow
def test_quantized_model_still_knows_the_answers(make_target):
    curve = quantize(make_target())
    assert [point["bits"] for point in curve] == [32, 8, 4]
    assert curve[0]["knowledge"] == 0 and curve[1]["knowledge"] > 0.9 and curve[2]["regurgitation"] > 0.5


@pytest.mark.parametrize(("bits", "error"), [(8, 0.5 / 127), (4, 0.16)])
def test_round_trip_error_is_at_most_half_a_step(world, model, bits, error):
    """Relative to the row's largest weight in 8 bits; NF4's widest gap is 0.30 of the block's largest weight."""
    before, after = (load_model(model, torch.float32, torch.device("cpu")) for _ in range(2))
    round_trip(after, bits)
    old = dict(before.model.named_parameters())
    changed = 0
    for name, new in after.model.named_parameters():
        if "layers" in name and new.ndim == 2:
            largest = old[name].abs().amax(1, keepdim=True) if bits == 8 else old[name].abs().max()
            assert ((new - old[name]).abs() <= error * largest * 1.001).all()
            changed += 1
        else:
            assert torch.equal(new, old[name]), name  # embeddings, norms and the head are unchanged
    assert changed == 14

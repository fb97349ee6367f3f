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


@pytest.mark.cuda
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_quantized_on_a_gpu_are_those_of_the_cpu(gpu, world, model, bits):
    """bitsandbytes' two kernels may choose the other neighbour of a weight that is halfway between two codes."""
    on_cpu, on_gpu = (load_model(model, torch.float32, device) for device in (torch.device("cpu"), gpu))
    before = {name: p.detach().clone() for name, p in on_cpu.model.named_parameters()}
    for lm in (on_cpu, on_gpu):
        round_trip(lm, bits)
    found = dict(on_gpu.model.named_parameters())
    assert any(not torch.equal(p, before[name]) for name, p in on_cpu.model.named_parameters())
    for name, p in on_cpu.model.named_parameters():
        differs = (found[name].cpu() - p).abs() > 1e-6 * p.abs().max()
        assert differs.float().mean() < 1e-3, name

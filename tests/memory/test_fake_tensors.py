"""Operators that skip FakeTensorMode, compared with FakeTensorMode."""

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, MambaConfig, MixtralConfig

from neko_lean.memory import fake_tensors
from neko_lean.memory.fake_models import fake_model
from neko_lean.memory.fake_tensors import FACTORIES, KERNELS, MetaKernels, tensors_in
from neko_lean.memory.two_models import two_model_loss
from tests.helpers import SIZES

FAMILIES = [LlamaConfig, Gemma2Config, MixtralConfig, MambaConfig]
CHANGES = {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4}


def storages(values):
    return [tensor.untyped_storage()._cdata for tensor in tensors_in(values)]


def described(out, args):
    """Everything that later operators and the counted bytes depend on. The stride of a single element is arbitrary."""
    given = storages(args)
    return [
        (
            tensor.shape,
            [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1],
            tensor.storage_offset(),
            tensor.dtype,
            tensor.device,
            tensor.untyped_storage().nbytes(),
            [storage for storage in storages([tensor]) if storage in given],
        )
        for tensor in tensors_in([out])
    ]


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.__name__)
def test_the_results_are_those_of_fake_tensor_mode(config, monkeypatch):
    dtype = torch.float32 if config is MambaConfig else torch.bfloat16  # Mamba's residual stream is in float32
    seen = set()
    run = MetaKernels._run

    def compared(self, operator, args, kwargs):
        out = run(self, operator, args, kwargs)
        expected = operator(*args, **{key: value for key, value in kwargs.items() if key != "device"})
        assert described(out, args) == described(expected, args), operator
        seen.add(operator)
        return out

    monkeypatch.setattr(MetaKernels, "_run", compared)
    with fake_tensors.fake_tensors():
        model = fake_model(config(**SIZES, **CHANGES), dtype).model
        ids = torch.zeros((2, 5), dtype=torch.int64)
        two_model_loss(model, model, (ids, ids), (ids, ids), 0.2).backward()
    assert len(seen & KERNELS) > 20 and seen & FACTORIES


def test_a_known_value_stays_known():
    with fake_tensors.fake_tensors():
        assert (torch.tensor(3) + 1).item() == 4  # FakeTensorMode keeps it, and a meta kernel would not
        assert torch.ones(2).fill_(1).device == torch.empty(0, device="cpu").device == torch.device("cpu")


def test_an_operator_fails_as_on_real_tensors():
    with fake_tensors.fake_tensors(), pytest.raises(RuntimeError, match="reduction dim"):
        torch.zeros(2, 3) @ torch.zeros(2, 3)

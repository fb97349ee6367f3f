"""Quantised checkpoints load as plain weights, or are refused before any weight is read."""

import importlib.util
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import neko_lean
from neko_lean.errors import NekoLeanError
from neko_lean.models import quantized
from neko_lean.models.fingerprints import weights_fingerprint
from neko_lean.models.loading import load_config, load_model, model_folder
from neko_lean.models.quantized import quantization_method
from tests.helpers import flat
from tests.models.checkpoints import build, configure

CPU = torch.device("cpu")
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
METHODS = [
    "gptq",
    "awq",
    "hqq",
    "compressed-tensors",
    "torchao",
    "aqlm",
    "quanto",
    "eetq",
    "bitnet",
    "fbgemm_fp8",
    "new",
]


def packed(weight):
    """MXFP4 blocks [E, out, in / 32, 16] and scales [E, out, in / 32], uint8, of a weight [E, in, out]; and the weight
    that they encode."""
    groups = weight.transpose(1, 2).unflatten(2, (-1, 32))
    exponent = torch.floor(torch.log2(groups.abs().amax(-1).clamp(min=1e-9) / 6)) + 1
    index = (groups[..., None] / torch.exp2(exponent)[..., None, None] - FP4).abs().argmin(-1)
    decoded = (FP4[index] * torch.exp2(exponent)[..., None]).flatten(2).transpose(1, 2).contiguous()
    low, high = index[..., 0::2].to(torch.uint8), index[..., 1::2].to(torch.uint8)
    return low | (high << 4), (exponent + 127).to(torch.uint8), decoded


@pytest.fixture
def mxfp4(tmp_path):
    """A GPT-OSS checkpoint with experts in MXFP4, and its dequantised tensors."""
    folder = tmp_path / "mxfp4"
    build("gpt_oss", hidden_size=64, intermediate_size=64, head_dim=16).save_pretrained(folder)
    tensors, expected = load_file(folder / "model.safetensors"), {}
    for name in list(tensors):
        expected[name] = tensors[name]
        if name.endswith(("gate_up_proj", "down_proj")):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"], expected[name] = packed(tensors.pop(name))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    configure(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return folder, expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_loads_as_plain_weights_that_can_be_saved(mxfp4, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("neko_lean.models.loading.as_causal_lm", lambda model: model)
    folder, expected = mxfp4
    model = load_model(model_folder(folder), dtype, CPU)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtype and torch.equal(tensor, expected[name].to(dtype)), name
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    again = load_model(model_folder(tmp_path / "saved"), dtype, CPU).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    assert weights_fingerprint(folder) != weights_fingerprint(tmp_path / "saved")
    assert not hasattr(load_config(folder), "quantization_config")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("nested", [False, True])
def test_other_methods_are_refused(model, world, tmp_path, method, nested):
    folder = shutil.copytree(model, tmp_path / "model")
    value = {"quantization_config": {"quant_method": method, "bits": 4}}
    configure(folder, **({"text_config": value} if nested else value))
    with pytest.raises(NekoLeanError, match=rf"quantised \({method}\)"):
        flat(neko_lean.memorize)(folder, tmp_path / "out", data=world)
    assert not (tmp_path / "out").exists()


def test_all_config_keys_that_declare_quantisation_are_recognised(model, tmp_path, monkeypatch):
    folder = shutil.copytree(model, tmp_path / "model")
    assert quantization_method(folder) is None
    for value, method in (
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"group_size": 64, "bits": 4}}, "quantization_config"),
        ({"quantization_config": None, "compression_config": {"quant_method": "x"}}, "x"),
        ({"compression_config": None, "quantization": {"group_size": 64}}, "quantization"),
        ({"quantization": None, "quantization_config": {}}, None),
    ):
        configure(folder, **value)
        assert quantization_method(folder) == method
    configure(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NekoLeanError, match="pip install accelerate"):
        model_folder(folder)


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="transformers dequantises fp8 with it alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_loads_as_plain_weights(tmp_path, dtype):
    folder = tmp_path / "fp8"
    build("llama", hidden_size=128, intermediate_size=128, head_dim=32).save_pretrained(folder)
    tensors, expected = load_file(folder / "model.safetensors"), {}
    for name, tensor in list(tensors.items()):
        expected[name] = tensor
        if "proj" in name:
            scale = tensor.abs().max().float().view(1, 1) / 448
            tensors[name] = (tensor / scale).to(torch.float8_e4m3fn)
            tensors[name.replace(".weight", ".weight_scale_inv")] = scale
            expected[name] = tensors[name].float() * scale
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    configure(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    loaded = load_model(folder, dtype, CPU).model
    assert all(torch.equal(tensor, expected[name].to(dtype)) for name, tensor in loaded.state_dict().items())
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(load_model(tmp_path / "saved", dtype, CPU).head, loaded.lm_head.weight)


@pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="transformers loads bitsandbytes with it alone"
)
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_loads_as_plain_weights(tmp_path, bits):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain = build("llama", hidden_size=128, intermediate_size=256)
    plain.save_pretrained(tmp_path / "plain")
    options = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=options)
    quantised.save_pretrained(tmp_path / "quantised")
    loaded = load_model(model_folder(tmp_path / "quantised"), torch.bfloat16, CPU).model
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        error = (tensor.float() - plain.state_dict()[name]).abs().max() / plain.state_dict()[name].abs().max()
        assert error < {4: 0.2, 8: 0.02}[bits], name
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(load_model(tmp_path / "saved", torch.bfloat16, CPU).head, loaded.lm_head.weight)

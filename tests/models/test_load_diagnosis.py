"""The error for weights that do not belong to their config.json names the tensors, the likely cause and the fix."""

import pytest
import torch

from neko_lean.errors import NekoLeanError
from tests.models.checkpoints import duplicated, load, prefixed, renamed, rewrite, without

UP_PROJ = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (prefixed("_orig_mod."), r"missing: lm_head.weight, .* and \d+ more; unexpected: _orig_mod.*torch.compile"),
        (renamed("model.", "model._orig_mod."), "torch.compile"),
        (prefixed("module."), "DistributedDataParallel"),
        (prefixed("policy.inner."), "inside another one; remove the prefix 'policy.inner.'"),
        (prefixed("base_model.model."), "inside another one; remove the prefix 'base_model.model.'"),
        (renamed("q_proj.weight", "q_proj.base_layer.weight"), "merge_and_unload"),
        (lambda t: {**t, "model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 64)}, "merge_and_unload"),
        (without("layers.1."), r"hold only 1 of the 2 layers that config.json states \(num_hidden_layers\)"),
        (without("layers.0."), "lack weights of layer 0"),
        (without("layers.1.mlp.up_proj"), "lack weights of layer 1"),
        (duplicated("layers.1.", "layers.2."), "hold 3 layers, but .* num_hidden_layers: 2"),
        (without("lm_head"), "missing: lm_head.weight. This looks like a base model without its head"),
        (lambda t: {**t, "model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, "unexpected: .*q_proj.bias"),
        (lambda t: {**t, "vision_tower.patch.weight": torch.ones(4)}, "multimodal"),
        (lambda t: {**t, "v_head.weight": torch.ones(1, 64)}, "unexpected: v_head.weight"),
        (lambda t: {**t, UP_PROJ: torch.ones(8, 64)}, r"\[8, 64\] instead of \[128, 64\]"),
        (lambda t: {n: x[:-3] if len(x) == len(t["lm_head.weight"]) else x for n, x in t.items()}, "a vocabulary of"),
        (lambda t: {**t, UP_PROJ.removeprefix("model."): torch.ones(128, 64)}, "the same tensor of the model"),
        (lambda t: {**t, UP_PROJ: torch.ones(128, 64, dtype=torch.int8)}, "as I8"),
        (lambda t: {n: x.to(torch.float8_e4m3fn) if "up_proj" in n else x for n, x in t.items()}, "as F8_E4M3"),
    ],
)  # fmt: skip
def test_the_cause_is_named_in_one_line(model, tmp_path, change, message):
    with pytest.raises(NekoLeanError, match=message) as error:
        load(rewrite(model, tmp_path / "changed", change))
    assert str(error.value).count(".weight") <= 6 and "\n" not in str(error.value)

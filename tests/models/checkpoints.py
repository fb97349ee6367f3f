"""Small checkpoints of many families, and ways to damage them."""

import json
import shutil

import torch
import transformers
from safetensors.torch import load_file, save_file

from neko_lean.models.loading import load_model

# Values for every config key that the families below have; each config takes the keys that it knows.
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_embd": 32, "n_layer": 2, "n_head": 4, "ffn_dim": 48,
    "word_embed_proj_dim": 32, "head_dim": 8, "rotary_dim": 8,
}  # fmt: skip


def build(model_type, **overrides):
    """A small random model of a family, in float32."""
    config_class = type(transformers.AutoConfig.for_model(model_type))
    known_keys = config_class().to_dict()
    sizes = {key: value for key, value in SIZES.items() if key in known_keys}
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config_class(**{**sizes, **overrides})).float()


def load(folder, dtype=torch.float32):
    return load_model(folder, dtype, torch.device("cpu"))


def rewrite(source, target, change):
    """Copy a checkpoint to `target` with its tensors, a dict by name, replaced by `change` of them."""
    shutil.copytree(source, target)
    save_file(change(load_file(source / "model.safetensors")), target / "model.safetensors", {"format": "pt"})
    return target


def configure(folder, **values):
    """Set values in config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# Changes for `rewrite`.


def renamed(old, new):
    return lambda tensors: {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}


def duplicated(old, new):
    """Adds a copy of each tensor under its new name."""
    return lambda tensors: {**tensors, **{n: x.clone() for n, x in renamed(old, new)(tensors).items()}}


def without(part):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def prefixed(prefix):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}

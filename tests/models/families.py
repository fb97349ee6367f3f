"""Random models of many families, built from transformers' config classes."""

import torch
import transformers

from tests.helpers import SIZES

MODEL_CLASSES = {"CTRL": "CTRLLMHeadModel", "GPT2": "GPT2LMHeadModel"}


def random_family_model(name, dtype=torch.float32, **sizes):
    """A random model whose logits are far enough from 0 for a soft cap to have an effect."""
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **sizes})
    torch.manual_seed(0)
    model = getattr(transformers, MODEL_CLASSES.get(name, f"{name}ForCausalLM"))(config)
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight.mul_(30)
        if head.bias is not None:
            head.bias.normal_()
    return model.to(dtype).eval()

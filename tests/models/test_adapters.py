"""LoRA adapters: the gradients of PEFT's own model in float64, merged weights, and a folder that PEFT reads."""

import copy
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from neko_lean.cache.reader import TeacherCache
from neko_lean.data.examples import read_rows
from neko_lean.data.tokenization import encode
from neko_lean.errors import NekoLeanError
from neko_lean.models.adapters import add_adapters, has_adapters, merged_weights, save_adapter
from neko_lean.models.causal_lm import as_causal_lm
from neko_lean.models.loading import load_model, load_tokenizer
from neko_lean.models.quantized_base import dequantize_base, quantize_base
from neko_lean.models.sharding import save_checkpoint
from neko_lean.recipe import load_recipe
from neko_lean.training.batch import make_batch, select_hidden
from neko_lean.training.layers import decoder_layers
from neko_lean.training.layerwise import LayerPass
from neko_lean.training.losses import batch_losses
from tests.helpers import SIZES, tiny

CPU = torch.device("cpu")
IDS = torch.arange(3, 15)[None]
GPT2 = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=64)


def gpt2(dtype=torch.float64):
    torch.manual_seed(0)
    return as_causal_lm(transformers.GPT2LMHeadModel(GPT2).to(dtype).eval())


def with_values(lm, seed=1):
    """The model with adapters that change what it computes."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lm.model.named_parameters():
        if ".lora_B." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return lm


def logits(model):
    return model(input_ids=IDS, use_cache=False).logits.detach()


def test_new_adapters_change_nothing_and_are_all_that_is_trained():
    lm = tiny("Llama", dtype=torch.bfloat16)
    before = logits(lm.model)
    add_adapters(lm, 4, 8.0, "auto", seed=0)
    assert torch.equal(logits(lm.model), before) and has_adapters(lm)
    trained = {name: p for name, p in lm.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * SIZES["num_hidden_layers"] and all(".lora_" in name for name in trained)
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert all(bool(p.any()) == (".lora_A." in name) for name, p in trained.items())


def test_the_same_seed_gives_the_same_adapters_in_any_dtype():
    first, second, other = (tiny("Llama", dtype=dtype) for dtype in (torch.float64, torch.bfloat16, torch.float64))
    for lm, seed in ((first, 3), (second, 3), (other, 4)):
        add_adapters(lm, 4, 8.0, "auto", seed)
    values = [[p.double() for n, p in lm.model.named_parameters() if ".lora_A." in n] for lm in (first, second, other)]
    assert all(map(torch.equal, values[0], values[1])) and not any(map(torch.equal, values[0], values[2]))


def test_targets_can_be_named_and_unknown_ones_are_refused():
    lm = tiny("Llama")
    add_adapters(lm, 4, 8.0, "q_proj, v_proj", seed=0)
    trained = {name.split(".")[4] for name, p in lm.model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "v_proj"}
    with pytest.raises(NekoLeanError, match=r"lora_targets 'c_attn' cannot be adapted in LlamaForCausalLM .*q_proj"):
        add_adapters(tiny("Llama"), 4, 8.0, "c_attn", seed=0)


@pytest.mark.parametrize(
    "make",
    [lambda: tiny("Llama"), lambda: tiny("Gemma", num_key_value_heads=2, head_dim=8), lambda: tiny("Phi3"), gpt2],
)
def test_merged_weights_give_the_logits_of_the_model_with_adapters(make):
    lm, plain = make(), make().model
    before = logits(plain)
    add_adapters(lm, 4, 8.0, "auto", seed=0)
    expected = logits(with_values(lm).model)
    plain.load_state_dict(merged_weights(lm, lm.model.state_dict()))
    close = 1e-5 if "Gemma" in type(plain).__name__ else 1e-11  # Gemma's norm computes in float32
    torch.testing.assert_close(logits(plain), expected, rtol=close, atol=close)
    assert (expected - before).abs().max() > 0.1


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_adapter_loads_in_peft_and_equals_the_merged_checkpoint(tied, tmp_path, model):
    lm = tiny("Llama", dtype=torch.float32, tie_word_embeddings=tied)
    original = copy.deepcopy(lm.model)
    add_adapters(lm, 4, 16.0, "auto", seed=0)
    expected = logits(with_values(lm).model)
    save_checkpoint(lm, load_tokenizer(model), tmp_path / "out", adapter_of="owner/base")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    elsewhere = PeftModel.from_pretrained(original, tmp_path / "out" / "adapter")
    torch.testing.assert_close(logits(elsewhere), expected, rtol=1e-5, atol=1e-5)
    config = elsewhere.peft_config["default"]
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (4, 16, "owner/base")
    with elsewhere.disable_adapter():  # taking the adapter off brings everything back
        assert (logits(elsewhere) - expected).abs().max() > 0.1


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_adapters_of_gpt2_on_a_quantised_base_merge_into_its_transposed_weights(quantization, tmp_path, model):
    lm, original = gpt2(torch.float32), gpt2(torch.float32).model
    before = logits(original)
    if quantization != "none":
        quantize_base(lm, quantization, CPU)
        original = copy.deepcopy(lm)
        dequantize_base(original, CPU)
        original = original.model
    add_adapters(lm, 4, 16.0, "auto", seed=0)
    expected = logits(with_values(lm).model)
    save_checkpoint(lm, load_tokenizer(model), tmp_path / "out", adapter_of="owner/base")

    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fan_in_fan_out")  # PEFT's, if the saved value is wrong
        elsewhere = PeftModel.from_pretrained(original, tmp_path / "out" / "adapter")
    torch.testing.assert_close(logits(elsewhere), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(elsewhere.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)
    assert elsewhere.peft_config["default"].fan_in_fan_out and (expected - before).abs().max() > 0.1


def test_saving_the_adapter_alone_needs_no_other_weights(tmp_path):
    lm = tiny("Llama", dtype=torch.float32)
    add_adapters(lm, 2, 4.0, "auto", seed=0)
    trained = {name: p for name, p in lm.model.named_parameters() if p.requires_grad}
    save_adapter(lm, trained, "base", tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_two_term_gradients_equal_those_of_peft_in_float64(world, model, cache):
    """The layer pass over micro-batches and the two-term loss, against PEFT's own model and plain autograd."""
    recipe = load_recipe("neko", {"micro_tokens": 128})
    tokenizer = load_tokenizer(model)
    forget, retain = (encode(read_rows(world, name), tokenizer, "neko", 128)[:6] for name in ("forget", "retain"))
    batch = make_batch(forget, retain, TeacherCache(cache), recipe, 0, CPU)
    assert len(batch.micro.input_ids) > 2

    # PEFT's model, made independently, with the same values.
    lm = load_model(model, torch.float32, CPU)
    lm.model.double().eval()
    config = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM")
    peft = get_peft_model(copy.deepcopy(lm.model), config, autocast_adapter_dtype=False)
    add_adapters(lm, 4, 12.0, "auto", seed=0)
    with_values(lm)
    own = {name: p for name, p in lm.model.named_parameters() if p.requires_grad}
    theirs = {name.removeprefix("base_model.model."): p for name, p in peft.named_parameters() if p.requires_grad}
    assert set(own) == set(theirs)
    for name, parameter in theirs.items():
        parameter.data = own[name].detach().clone()

    # One graph over all micro-batches.
    plain = as_causal_lm(peft.base_model.model)
    expected = batch_losses(select_hidden(plain, batch.micro), plain, batch, recipe)
    expected["loss"].backward()

    layer_pass = LayerPass(lm, decoder_layers(lm))
    losses = batch_losses(layer_pass.forward(batch.micro), lm, batch, recipe)
    assert losses["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-12)
    assert losses["forget_loss"].item() != 0 != losses["retain_loss"].item()
    losses["loss"].backward()
    grads = {}

    def keep(parameter):
        if parameter.grad is not None:
            grads[next(name for name, p in own.items() if p is parameter)] = parameter.grad
            parameter.grad = None

    layer_pass.backward(keep)
    assert set(grads) == set(own)
    for name, grad in grads.items():
        scale = theirs[name].grad.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(grad, theirs[name].grad, rtol=1e-9, atol=1e-11 * scale)

"""The layerwise pass: the gradients of a plain backward pass, with the gradients of one layer alive at a time."""

import dataclasses

import pytest
import torch
import transformers

from neko_lean.cache.reader import TeacherCache
from neko_lean.data.examples import read_rows
from neko_lean.data.tokenization import encode
from neko_lean.errors import NekoLeanError
from neko_lean.memory.live_tensors import LiveTensors
from neko_lean.models.causal_lm import as_causal_lm
from neko_lean.models.loading import load_model, load_tokenizer
from neko_lean.recipe import load_recipe
from neko_lean.training.batch import make_batch, select_hidden
from neko_lean.training.determinism import deterministic
from neko_lean.training.layers import compile_layers, decoder_layers, freeze
from neko_lean.training.layerwise import LayerPass
from neko_lean.training.losses import batch_losses
from neko_lean.training.micro_batches import MicroBatches
from tests.helpers import make_cache, random_model, tiny

CPU = torch.device("cpu")
SMALL = {"num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = ["Olmo", "Olmo2", "Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma3Text", "Phi3"]


def small(family, tied=False, attention=None, **more):
    """A random float64 model of a family, with weights large enough for every layer to matter."""
    model = tiny(family, attention, **{**SMALL, "tie_word_embeddings": tied, **more}).model
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3).add_(0.1 * torch.randn_like(p))
    return as_causal_lm(model)


def micro_batches(lm, seed=0, count=3):
    """Token ids of `count` micro-batches, and positions of each, such that some examples have none."""
    generator = torch.Generator().manual_seed(seed)
    micro = [torch.randint(0, lm.head.shape[0], (n + 1, 5 + 2 * n), generator=generator) for n in range(count)]
    index = [torch.randperm(ids.numel(), generator=generator)[: ids.numel() // 2].sort()[0] for ids in micro]
    return MicroBatches(micro, [None] * count, index)


def nonlinear_loss(hidden, head, index):
    """A loss that is neither linear nor symmetric in the positions."""
    return ((hidden @ head.T).logsumexp(1) * torch.arange(1, len(hidden) + 1)).sum() / sum(map(len, index))


def gradients(lm):
    return {name: p.grad.clone() for name, p in lm.model.named_parameters() if p.grad is not None}


def plain_and_layerwise(lm, seed=0):
    """Gradients of a plain forward and backward pass, and of a LayerPass."""
    micro = micro_batches(lm, seed)
    hidden = select_hidden(lm, micro)
    nonlinear_loss(hidden, lm.head, micro.index).backward()
    plain = gradients(lm)
    lm.model.zero_grad()
    layer_pass = LayerPass(lm, decoder_layers(lm))
    hidden = layer_pass.forward(micro)
    nonlinear_loss(hidden, lm.head, micro.index).backward()
    grads = {}

    def keep_and_free(parameter):
        if parameter.grad is not None:
            name = next(n for n, p in lm.model.named_parameters() if p is parameter)
            assert name not in grads, f"{name} was updated twice"
            grads[name] = parameter.grad.clone()
            parameter.grad = None

    layer_pass.backward(keep_and_free)
    return plain, grads


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_a_plain_backward(family, tied):
    lm = small(family, tied)
    plain, layerwise = plain_and_layerwise(lm)
    assert set(layerwise) == set(plain) == {name for name, _ in lm.model.named_parameters()}
    # Gemma's norm multiplies by its weight in float32 whatever the model's dtype, so sums over positions round there.
    close = 1e-6 if family.startswith("Gemma") else 1e-11
    for name, grad in plain.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(layerwise[name], grad, rtol=close, atol=close * grad.abs().max().item())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("last", [1, 2])
def test_only_the_last_layers_are_trained(last, tied):
    lm = small("Llama", tied)
    freeze(lm, last)
    plain, layerwise = plain_and_layerwise(lm)
    assert set(layerwise) == set(plain)
    assert all(torch.allclose(layerwise[name], grad, rtol=1e-11, atol=1e-13) for name, grad in plain.items())
    trained = {name.split(".")[2] for name in layerwise if ".layers." in name}
    assert trained == {str(n) for n in range(3 - last, 3)}
    assert ("lm_head.weight" in layerwise) != tied and "model.norm.weight" in layerwise
    assert "model.embed_tokens.weight" not in layerwise
    with pytest.raises(NekoLeanError, match="train_last is 4"):
        freeze(lm, 4)


def test_no_input_is_stored_for_frozen_layers():
    lm = small("Olmo")
    freeze(lm, 1)
    layer_pass = LayerPass(lm, decoder_layers(lm))
    layer_pass.forward(micro_batches(lm))
    assert [len(calls) for calls in layer_pass.calls] == [1, 1, 1] and not layer_pass.embedding_edges


def test_families_without_separable_layers_are_refused():
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)
    with pytest.raises(NekoLeanError, match="GPT2LMHeadModel has no list of decoder layers"):
        decoder_layers(as_causal_lm(transformers.GPT2LMHeadModel(config)))
    lm = small("Olmo")
    lm.backbone.layers[0], lm.backbone.layers[1] = lm.backbone.layers[1], lm.backbone.layers[0]
    decoder_layers(lm)  # the order of layers is free
    lm.backbone.layers[2] = lm.backbone.layers[1]
    with pytest.raises(NekoLeanError, match="OlmoForCausalLM"):
        decoder_layers(lm)


@pytest.mark.parametrize("family", FAMILIES[:6])
def test_sdpa_gets_no_mask_so_that_its_flash_kernel_can_be_used(family, monkeypatch):
    """In the forward pass, when layers run again, and in a plain pass. Packing would need a mask here."""
    lm = small(family, attention="sdpa")
    kernel, masks = torch.nn.functional.scaled_dot_product_attention, []

    def watched(*args, attn_mask=None, is_causal=False, **named):
        masks.append((attn_mask is not None, is_causal))
        return kernel(*args, attn_mask=attn_mask, is_causal=is_causal, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    plain_and_layerwise(lm)
    assert len(masks) == 3 * 3 + 2 * 3 * 3 + 3 and set(masks) == {(False, True)}
    masks.clear()
    lm.hidden(torch.arange(6)[None], torch.tensor([[0, 1, 2, 0, 1, 2]]))
    assert set(masks) == {(True, False)}


@pytest.fixture(scope="module")
def two_term(world, tmp_path_factory):
    """Models, examples and teacher cache for the real loss."""
    folder = tmp_path_factory.mktemp("layerwise")
    models = {tied: random_model(world, folder / f"s{tied}", seed=2, tied=tied, scale=5.0) for tied in (False, True)}
    make_cache(models[False], world, folder / "cache", format="neko", dtype="float32")
    tokenizer = load_tokenizer(models[False])
    rows = {name: encode(read_rows(world, name), tokenizer, "neko", 128) for name in ("forget", "retain")}
    return models, rows, TeacherCache(folder / "cache")


@pytest.mark.parametrize("tied", [False, True])
def test_the_real_loss_keeps_one_layers_gradients_alive(two_term, tied):
    models, rows, cache = two_term
    recipe = load_recipe("neko", {"micro_tokens": 128})
    lm = load_model(models[tied], torch.float32, CPU)
    lm.model.double().eval()
    batch = make_batch(rows["forget"][:8], rows["retain"][:8], cache, recipe, 0, CPU)
    assert len(batch.micro.input_ids) > 3
    whole = make_batch(
        rows["forget"][:8], rows["retain"][:8], cache, dataclasses.replace(recipe, micro_tokens=10**6), 0, CPU
    )
    assert len(whole.micro.input_ids) == 1
    expected = batch_losses(select_hidden(lm, whole.micro), lm, whole, recipe)
    expected["loss"].backward()
    plain = gradients(lm)
    lm.model.zero_grad()

    names = {id(p): name for name, p in lm.model.named_parameters()}
    alive: set[str] = set()
    most: list[set[str]] = []

    def gradient_appears(p):
        alive.add(names[id(p)])
        most.append(set(alive))

    for p in lm.model.parameters():
        p.register_post_accumulate_grad_hook(gradient_appears)

    def update(p):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, plain[names[id(p)]], rtol=1e-9, atol=1e-12)
            p.grad = None
            alive.discard(names[id(p)])

    layer_pass = LayerPass(lm, decoder_layers(lm))
    losses = batch_losses(layer_pass.forward(batch.micro), lm, batch, recipe)
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name].item(), rel=1e-9)
    losses["loss"].backward()
    layer_pass.backward(update)
    assert not alive and len(most) > 10
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    for together in most:
        assert len({name.split(".")[2] for name in together if ".layers." in name}) <= 1
        others = {name for name in together if ".layers." not in name}
        assert others <= ({head} if tied or any(".layers." in n for n in together) else {head, *others})
        assert len(others) <= 1


def test_more_examples_raise_the_peak_by_little_more_than_layer_inputs():
    """With 12 layers and one position in eight needed, only layer inputs and the needed hidden states grow."""
    sizes = {**SMALL, "num_hidden_layers": 12, "hidden_size": 64, "intermediate_size": 256}
    lm = as_causal_lm(tiny("Olmo", dtype=torch.float32, **sizes).model)
    layer_pass = LayerPass(lm, decoder_layers(lm))

    def free(p):
        p.grad = None

    def peak(count):
        micro = [torch.randint(0, 96, (4, 64)) for _ in range(count)]
        index = [torch.arange(0, 256, 8) for _ in range(count)]
        with LiveTensors() as live:
            nonlinear_loss(
                layer_pass.forward(MicroBatches(micro, [None] * len(micro), index)), lm.head, index
            ).backward()
            layer_pass.backward(free)
        return live.peak

    peak(1)
    few, many = peak(8), peak(16)
    inputs = 8 * 12 * 256 * 64 * 4  # bytes of eight more micro-batches' inputs
    one_layer_for_them_all = 8 * 256 * (3 * 256 + 4 * 64) * 4
    assert inputs <= many - few < 1.15 * inputs < inputs + one_layer_for_them_all


@pytest.mark.cuda
def test_layer_inputs_in_pinned_memory_give_the_same_gradients_on_a_gpu(gpu):
    lm = tiny("Llama", hidden_size=256, intermediate_size=512, num_hidden_layers=4, max_position_embeddings=512)
    lm.model.to(gpu, torch.bfloat16)
    ids = [torch.randint(0, 96, (8, 512), device=gpu) for _ in range(4)]
    micro = MicroBatches(ids, [None] * 4, [torch.arange(0, 4096, 3, device=gpu)] * 4)

    def layerwise_gradients(offload):
        layer_pass, grads = LayerPass(lm, decoder_layers(lm), offload=offload), {}

        def keep_and_free(parameter):
            if parameter.grad is not None:
                grads[parameter] = parameter.grad.cpu()
            parameter.grad = None

        layer_pass.forward(micro).float().square().mean().backward()
        inputs = [call.hidden for calls in layer_pass.calls for call in calls]
        assert all(hidden.is_pinned() if offload else hidden.is_cuda for hidden in inputs) and len(inputs) == 16
        layer_pass.backward(keep_and_free)
        return grads

    with deterministic(gpu):
        on_gpu, offloaded = layerwise_gradients(False), layerwise_gradients(True)
    assert on_gpu.keys() == offloaded.keys() and len(on_gpu) > 30
    assert all(torch.equal(grad, offloaded[parameter]) for parameter, grad in on_gpu.items())


@pytest.mark.cuda
@pytest.mark.slow
def test_compiled_layers_give_the_gradients_of_plain_ones_on_a_gpu(gpu):
    lm = tiny("Llama", dtype=torch.float32, hidden_size=64, intermediate_size=128)
    lm.model.to(gpu)
    micro = [torch.randint(0, 96, shape, device=gpu) for shape in ((4, 20), (1, 33), (3, 12))]
    index = [torch.arange(ids.numel(), device=gpu) for ids in micro]

    def all_gradients():
        layer_pass = LayerPass(lm, decoder_layers(lm))
        layer_pass.forward(MicroBatches(micro, [None] * 3, index)).square().mean().backward()
        layer_pass.backward(lambda parameter: None)
        grads = gradients(lm)
        lm.model.zero_grad()
        return grads

    plain = all_gradients()
    compile_layers(decoder_layers(lm))
    compiled = all_gradients()
    for name, grad in plain.items():
        assert (compiled[name] - grad).norm() <= 1e-4 * grad.norm(), name

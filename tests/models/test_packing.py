"""Sequence packing: packed sequences do not influence each other, and models that mix them are not packed."""

import pytest
import torch
import transformers.integrations.flex_attention
from torch.nn.attention import flex_attention

from neko_lean.models.packing import keeps_sequences_apart, supports_packing
from tests.helpers import tiny


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("Olmo", "eager"),
        ("Olmo", "sdpa"),
        ("Llama", "eager"),
        ("Llama", "sdpa"),
        pytest.param("Llama", "flex_attention", marks=pytest.mark.slow),  # has no backward pass on a CPU
    ],
)
def test_packed_sequences_are_independent(family, attention, monkeypatch):
    # Compilation takes seconds for each new shape.
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    uncompiled = lambda *args, training, **kwargs: flex_attention.flex_attention(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(transformers.integrations.flex_attention, "compile_friendly_flex_attention", uncompiled)

    lm = tiny(family, attention)
    lengths, generator = [7, 1, 12, 5], torch.Generator().manual_seed(0)
    sequences = [torch.randint(0, 96, (length,), generator=generator) for length in lengths]
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]  # [1, 25]
    with torch.no_grad():
        packed = lm.hidden(torch.cat(sequences)[None], position_ids)[0].split(lengths)
        # Each sequence gives the hidden states that it gives alone, up to float32 softmax.
        for sequence, hidden in zip(sequences, packed, strict=True):
            torch.testing.assert_close(hidden, lm.hidden(sequence[None])[0], rtol=1e-5, atol=1e-5)
        # Changing one sequence changes its own hidden states only.
        for changed in range(4):
            ids = [(ids + 1 + n) % 96 if n == changed else ids for n, ids in enumerate(sequences)]
            repacked = lm.hidden(torch.cat(ids)[None], position_ids)[0].split(lengths)
            assert not torch.equal(repacked[changed], packed[changed])
            assert all(torch.equal(repacked[n], packed[n]) for n in range(4) if n != changed)
    assert keeps_sequences_apart(lm) and supports_packing(lm) == (attention == "flex_attention")
    if attention == "flex_attention":
        return

    # The gradient of one sequence's loss reaches the embeddings of its own tokens only.
    for number in range(4):
        embedded = lm.embedding[torch.cat(sequences)][None].detach().requires_grad_()
        hidden = lm.backbone(inputs_embeds=embedded, position_ids=position_ids, use_cache=False).last_hidden_state
        hidden[0].split(lengths)[number].square().sum().backward()
        for n, gradient in enumerate(embedded.grad[0].split(lengths)):
            assert bool(gradient.any()) == (n == number)


def test_models_that_mix_sequences_are_not_packed():
    # A recurrent state runs on from one sequence to the next.
    assert not keeps_sequences_apart(tiny("Mamba", None))

    lm = tiny("Olmo", "sdpa")
    layer = lm.backbone.layers[1]
    layer.register_forward_hook(lambda _, __, out: out + out.mean(1, keepdim=True) / 1000)
    assert not keeps_sequences_apart(lm)


def test_rotary_positions_may_start_anywhere():
    lm = tiny("Olmo", "sdpa")

    def continue_counting(_, args, kwargs):
        return args, {"position_ids": torch.arange(kwargs["position_ids"].shape[1])[None]}

    lm.backbone.rotary_emb.register_forward_pre_hook(continue_counting, with_kwargs=True)
    assert keeps_sequences_apart(lm)  # rotary positions are relative
    lm.model.config._attn_implementation = "no such kernel"
    assert not supports_packing(lm)


@pytest.mark.cuda
@pytest.mark.slow
def test_packed_rows_train_as_padded_ones_with_flex_attention_on_a_gpu(gpu):
    """FlexAttention is compiled, forward and backward."""
    lm = tiny("Llama", "flex_attention", torch.float32, hidden_size=64, intermediate_size=128)
    lm.model.to(gpu)
    assert supports_packing(lm)
    sequences = [torch.randint(0, 96, (length,), device=gpu) for length in (37, 5, 64)]
    position_ids = torch.cat([torch.arange(len(ids), device=gpu) for ids in sequences])[None]  # [1, 106]

    def gradients(hidden):
        return torch.autograd.grad(hidden.square().mean(), list(lm.backbone.parameters()))

    packed = lm.hidden(torch.cat(sequences)[None], position_ids)[0]
    apart = torch.cat([lm.hidden(ids[None])[0] for ids in sequences])
    torch.testing.assert_close(packed, apart, rtol=1e-3, atol=1e-3)
    for one, other in zip(gradients(packed), gradients(apart), strict=True):
        assert (one - other).norm() <= 1e-2 * other.norm()

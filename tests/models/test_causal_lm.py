"""Loading, splitting, fingerprints, and what is refused."""

import json
import shutil

import pytest
import torch
import transformers.integrations.flex_attention
from safetensors.torch import load_file, save_file
from torch.nn.attention import flex_attention

from neko_lean.errors import NekoLeanError
from neko_lean.models.devices import pick_device, pick_dtype, warn_emulated_bfloat16
from neko_lean.models.fingerprints import tokenizer_fingerprint, weights_fingerprint
from neko_lean.models.lm_head import logits
from neko_lean.models.loading import load_model, load_tokenizer, model_folder, new_model
from neko_lean.models.packing import keeps_sequences_apart, supports_packing
from tests.helpers import random_model, tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize("tied", [False, True])
def test_backbone_and_head_give_the_models_logits(world, tmp_path, tied):
    lm = load_model(random_model(world, tmp_path / "m", tied=tied), torch.float32, CPU)
    ids = torch.randint(0, lm.head.shape[0], (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with torch.no_grad():
        wanted = lm.model(input_ids=ids, attention_mask=mask).logits
        hidden = lm.hidden(ids)  # without the mask: padding stands to the right
    got = logits(hidden.flatten(0, 1), lm.head).view_as(wanted)
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("Olmo", "eager"),
        ("Olmo", "sdpa"),
        ("Llama", "eager"),
        ("Llama", "sdpa"),
        ("Llama", "flex_attention"),  # on a CPU it has no backward pass
    ],
)
def test_no_packed_document_sees_another(family, attention, monkeypatch):
    # Compiled it takes seconds for each new shape.
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    uncompiled = lambda *args, training, **named: flex_attention.flex_attention(*args, **named)  # noqa: E731
    monkeypatch.setattr(transformers.integrations.flex_attention, "compile_friendly_flex_attention", uncompiled)
    lm = tiny(family, attention)
    lengths, generator = [7, 1, 12, 5], torch.Generator().manual_seed(0)
    documents = [torch.randint(0, 96, (n,), generator=generator) for n in lengths]
    places = torch.cat([torch.arange(n) for n in lengths])[None]  # [1, 25]
    with torch.no_grad():
        packed = lm.hidden(torch.cat(documents)[None], places)[0].split(lengths)
        for document, one in zip(documents, packed, strict=True):
            torch.testing.assert_close(one, lm.hidden(document[None])[0], rtol=1e-5, atol=1e-5)  # softmax is in float32
        for changed in range(4):
            others = [(ids + 1 + n) % 96 if n == changed else ids for n, ids in enumerate(documents)]
            again = lm.hidden(torch.cat(others)[None], places)[0].split(lengths)
            assert not torch.equal(again[changed], packed[changed])
            assert all(torch.equal(again[n], packed[n]) for n in range(4) if n != changed)
    assert keeps_sequences_apart(lm) and supports_packing(lm) == (attention == "flex_attention")
    if attention == "flex_attention":
        return
    # What one document's loss sends back to the embedding reaches no token of another.
    for number in range(4):
        embedded = lm.embedding[torch.cat(documents)][None].detach().requires_grad_()
        hidden = lm.backbone(inputs_embeds=embedded, position_ids=places, use_cache=False).last_hidden_state
        hidden[0].split(lengths)[number].square().sum().backward()
        for n, gradient in enumerate(embedded.grad[0].split(lengths)):
            assert bool(gradient.any()) == (n == number)


def test_models_that_mix_documents_do_not_pack():
    assert not keeps_sequences_apart(tiny("Mamba", None))  # its state runs on from one to the next
    lm = tiny("Olmo", "sdpa")
    layer = lm.backbone.layers[1]
    layer.register_forward_hook(lambda _, __, out: out + out.mean(1, keepdim=True) / 1000)
    assert not keeps_sequences_apart(lm)
    lm = tiny("Olmo", "sdpa")
    lm.backbone.rotary_emb.register_forward_pre_hook(  # positions go on counting
        lambda _, args, named: (args, {"position_ids": torch.arange(named["position_ids"].shape[1])[None]}),
        with_kwargs=True,
    )
    assert keeps_sequences_apart(lm)  # rotary positions are relative: where a document begins to count is all the same
    lm.model.config._attn_implementation = "no such kernel"
    assert not supports_packing(lm)


def test_a_kernel_that_is_not_installed_is_one_sentence(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "attn_implementation": "flash_attention_2"}))
    with pytest.raises(NekoLeanError, match="cannot be loaded as a causal language model: FlashAttention2"):
        load_model(copy, torch.float32, CPU)


def test_new_model_depends_on_the_seed_alone(world):
    one, two, other = (new_model(world / "base", torch.float32, CPU, seed).head for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_fingerprints_follow_content(world, model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    assert weights_fingerprint(copy) == weights_fingerprint(model)
    tensors = load_file(copy / "model.safetensors")
    # The same tensors in two files are the same weights.
    names = sorted(tensors)
    (copy / "model.safetensors").unlink()
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, copy / file)
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights_fingerprint(copy) == weights_fingerprint(model)
    tensors[names[0]].view(-1)[0] += 1
    save_file({name: tensors[name] for name in names[::2]}, copy / "a.safetensors")
    assert weights_fingerprint(copy) != weights_fingerprint(model)

    tokenizer = load_tokenizer(model)
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)  # calling it leaves no trace
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.save_pretrained(tmp_path / "again")
    assert tokenizer_fingerprint(load_tokenizer(tmp_path / "again")) == before
    tokenizer.add_tokens(["newtoken"])
    assert tokenizer_fingerprint(tokenizer) != before


def test_what_is_no_model_is_said_in_one_sentence(world, model, tmp_path):
    for name in (tmp_path, tmp_path / "nowhere", "a/b/c", "plainname", "./x/y"):
        with pytest.raises(NekoLeanError):
            model_folder(name)
    with pytest.raises(NekoLeanError, match="safetensors"):
        load_model(world / "base", torch.float32, CPU)
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(NekoLeanError, match="broken"):
        load_model(broken, torch.float32, CPU)
    with pytest.raises(NekoLeanError, match="not a readable safetensors"):
        weights_fingerprint(broken)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (broken / name).unlink()
    with pytest.raises(NekoLeanError, match="tokenizer"):
        load_tokenizer(broken)
    with pytest.raises(NekoLeanError, match="dtype"):
        pick_dtype("float16")
    with pytest.raises(NekoLeanError, match="device"):
        pick_device("gpu")


def test_no_pickle_is_read(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(NekoLeanError, match="safetensors only"):
        load_model(folder, torch.float32, CPU)


def test_a_cpu_that_emulates_bfloat16_is_named(monkeypatch, capsys):
    warn_emulated_bfloat16("bfloat16", CPU, quiet=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False, raising=False)
    warn_emulated_bfloat16("float32", CPU, quiet=False)
    assert capsys.readouterr().err == ""
    warn_emulated_bfloat16("bfloat16", CPU, quiet=False)
    assert "--set dtype=float32 is faster" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_and_other_kinds_of_device_are_refused(monkeypatch):
    with pytest.raises(NekoLeanError, match="device 'meta' is not supported; use cpu, cuda or cuda:N"):
        pick_device("meta")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(
        NekoLeanError, match="device 'cuda:2' does not exist; the last GPU that PyTorch finds is cuda:1"
    ):
        pick_device("cuda:2")

"""What is loaded is what the files hold, for every way in which a checkpoint and its config.json can disagree."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import neko_lean
from neko_lean.cache.writer import cache_teacher
from neko_lean.errors import NekoLeanError
from neko_lean.models.causal_lm import split
from neko_lean.models.load_checks import is_finite
from neko_lean.models.loading import load_model, load_tokenizer, model_folder
from neko_lean.models.weight_files import stored_tensors
from neko_lean.options import OutputOptions, RunOptions
from neko_lean.scoring.options import ScoreSettings
from neko_lean.scoring.run import score
from tests.helpers import SMALL, random_model

CPU = torch.device("cpu")
# Diverse in their names, in what is tied, in experts that are fused, and in buffers.
FAMILIES = [
    "bloom", "cohere", "deepseek_v3", "ernie4_5_moe", "falcon", "gemma", "gemma3_text", "glm4", "gpt_neox", "gpt_oss",
    "gpt2", "gptj", "granitemoe", "llama", "mamba", "mixtral", "opt", "phi3", "qwen2_moe", "qwen3", "qwen3_moe",
    "stablelm",
]  # fmt: skip
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_embd": 32, "n_layer": 2, "n_head": 4, "ffn_dim": 48,
    "word_embed_proj_dim": 32, "head_dim": 8, "rotary_dim": 8,
}  # fmt: skip


def build(kind, **change):
    """A small random model of a family, in float32."""
    config_class = type(transformers.AutoConfig.for_model(kind))
    known = config_class().to_dict()
    config = config_class(**{**{key: value for key, value in SIZES.items() if key in known}, **change})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).float()


def load(folder, dtype=torch.float32):
    return load_model(folder, dtype, CPU)


def rewrite(source, target, change):
    """A copy of a checkpoint whose tensors went through `change`."""
    shutil.copytree(source, target)
    save_file(change(load_file(source / "model.safetensors")), target / "model.safetensors", {"format": "pt"})
    return target


def configure(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def renamed(old, new):
    return lambda tensors: {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}


def twice(old, new):
    return lambda tensors: {**tensors, **{n: x.clone() for n, x in renamed(old, new)(tensors).items()}}


def without(part):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def prefixed(prefix):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.fixture(scope="session")
def tied(world, tmp_path_factory):
    return random_model(world, tmp_path_factory.mktemp("tied"), tied=True)


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_transformers_saves_loads_as_it_is(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "neko_lean.models.causal_lm.split", lambda model: model
    )  # which of them can be trained is another test
    model = build(kind)
    model.save_pretrained(tmp_path)
    loaded, wanted = load(tmp_path).state_dict(), model.state_dict()
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)
    loaded = load(tmp_path, torch.bfloat16)
    loaded.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", torch.bfloat16).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (prefixed("_orig_mod."), r"missing: lm_head.weight, .* and \d+ more; unexpected: _orig_mod.*torch.compile"),
        (renamed("model.", "model._orig_mod."), "torch.compile"),
        (prefixed("module."), "DistributedDataParallel"),
        (prefixed("policy.inner."), "inside another one: remove 'policy.inner.'"),
        (prefixed("base_model.model."), "inside another one: remove 'base_model.model.'"),
        (renamed("q_proj.weight", "q_proj.base_layer.weight"), "merge_and_unload"),
        (lambda t: {**t, "model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 64)}, "merge_and_unload"),
        (without("layers.1."), r"hold only 1 of the 2 layers that config.json says \(num_hidden_layers\)"),
        (without("layers.0."), "lack weights of layer 0"),
        (without("layers.1.mlp.up_proj"), "lack weights of layer 1"),
        (twice("layers.1.", "layers.2."), "hold 3 layers, and .* num_hidden_layers: 2"),
        (without("lm_head"), "missing: lm_head.weight. This looks like a base model without its head"),
        (lambda t: {**t, "model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, "unexpected: .*q_proj.bias"),
        (lambda t: {**t, "vision_tower.patch.weight": torch.ones(4)}, "multimodal"),
        (lambda t: {**t, "v_head.weight": torch.ones(1, 64)}, "unexpected: v_head.weight"),
        (lambda t: {**t, "model.layers.0.mlp.up_proj.weight": torch.ones(8, 64)}, r"\[8, 64\] instead of \[128, 64\]"),
        (lambda t: {n: x[:-3] if len(x) == len(t["lm_head.weight"]) else x for n, x in t.items()}, "a vocabulary of"),
        (lambda t: {**t, "layers.0.mlp.up_proj.weight": torch.ones(128, 64)}, "the same tensor of the model"),
        (lambda t: {**t, "model.layers.0.mlp.up_proj.weight": torch.ones(128, 64, dtype=torch.int8)}, "as I8"),
        (lambda t: {n: x.to(torch.float8_e4m3fn) if "up_proj" in n else x for n, x in t.items()}, "as F8_E4M3"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_the_models_are_named(model, tmp_path, change, said):
    with pytest.raises(NekoLeanError, match=said) as caught:
        load(rewrite(model, tmp_path / "changed", change))
    assert str(caught.value).count(".weight") <= 6 and "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [prefixed("_orig_mod."), without("layers.1."), without("lm_head")])
def test_every_command_refuses_them_and_writes_nothing(model, world, tmp_path, change):
    (tmp_path / "out").mkdir()
    folder, out = rewrite(model, tmp_path / "changed", change), tmp_path / "out" / "x"
    for run in (
        lambda: score(folder, world, out, settings=ScoreSettings(max_new_tokens=4), options=OutputOptions(quiet=True)),
        lambda: cache_teacher(folder, world, out, options=OutputOptions(quiet=True)),
        lambda: neko_lean.memorize(folder, world, out, overrides=SMALL, options=RunOptions(quiet=True)),
        lambda: neko_lean.unlearn(
            folder, out, world, world, recipe="neko", overrides=SMALL, options=RunOptions(quiet=True)
        ),
    ):
        with pytest.raises(NekoLeanError, match=r"are not those of the OlmoForCausalLM that its config.json describes"):
            run()
        assert not list((tmp_path / "out").iterdir())


def test_what_a_base_model_lacks_or_an_old_checkpoint_has_more_is_fine(model, tied, tmp_path):
    # An untied head without the prefix, as transformers' base models are saved; rotary frequencies of old checkpoints.
    bare = rewrite(model, tmp_path / "bare", lambda t: {n.removeprefix("model."): x for n, x in t.items()})
    old = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in range(2)}
    more = rewrite(model, tmp_path / "more", lambda t: {**t, **old})
    for folder in (bare, more):
        assert torch.equal(load(folder).head, load(model).head)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    lm = load(tied)
    assert lm.head is lm.embedding
    # The head alone is stored, as some programs do.
    swapped = load(rewrite(tied, tmp_path / "swapped", renamed("model.embed_tokens", "lm_head")))
    assert torch.equal(swapped.embedding, lm.embedding) and swapped.head is swapped.embedding


def test_masks_of_old_gpt2_checkpoints_are_left_out(tmp_path):
    made = build("gpt2")
    made.save_pretrained(tmp_path / "gpt2")
    mask = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()
    more = {f"h.{n}.attn.bias": mask.clone() for n in range(2)} | {"h.0.attn.masked_bias": torch.tensor(-1e4)}
    bare = rewrite(
        tmp_path / "gpt2", tmp_path / "old", lambda t: {n.removeprefix("transformer."): x for n, x in t.items()} | more
    )
    assert torch.equal(load(bare).head, made.lm_head.weight)


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_kept(tied, tmp_path, capsys):
    head = torch.randn_like(load(tied).embedding)
    folder = rewrite(tied, tmp_path / "both", lambda t: {**t, "lm_head.weight": head})
    lm = load(folder)
    assert torch.equal(lm.head, head) and not torch.equal(lm.embedding, head)
    assert "tie_word_embeddings: false" in capsys.readouterr().err
    lm.model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(load(tmp_path / "saved").head, head)
    same = rewrite(tied, tmp_path / "same", lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    lm = load(same)
    assert lm.head is lm.embedding and lm.model.config.tie_word_embeddings
    assert "warning" not in capsys.readouterr().err
    configure(folder, tie_word_embeddings=False)
    assert torch.equal(load(folder).head, head) and "warning" not in capsys.readouterr().err


def in_two_files(folder, tensors, index=None):
    """Write a checkpoint in two files, whose index says `index` of some tensors."""
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, folder / file, {"format": "pt"})
    listed = {name: file for file, some in parts.items() for name in some} | (index or {})
    listed = {name: file for name, file in listed.items() if file}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return parts


def test_an_index_agrees_with_its_files(model, tmp_path):
    tensors = load_file(model / "model.safetensors")
    folder = shutil.copytree(model, tmp_path / "good")
    in_two_files(folder, tensors)
    assert torch.equal(load(folder).head, tensors["lm_head.weight"])
    last = sorted(tensors)[-1]
    for index, said in (({"extra.weight": "a.safetensors"}, "lists extra.weight"), ({last: None}, f"holds {last}")):
        other = shutil.copytree(model, tmp_path / said.replace(" ", "-"))
        in_two_files(other, tensors, index)
        with pytest.raises(NekoLeanError, match=said):
            load(other)
    save_file({**load_file(folder / "b.safetensors"), "lm_head.weight": tensors["lm_head.weight"]},
              folder / "b.safetensors", {"format": "pt"})  # fmt: skip
    assert torch.equal(load(folder).head, tensors["lm_head.weight"])  # twice the same does no harm
    save_file({**load_file(folder / "b.safetensors"), "lm_head.weight": tensors["lm_head.weight"] + 1},
              folder / "b.safetensors", {"format": "pt"})  # fmt: skip
    with pytest.raises(NekoLeanError, match=r"both hold lm_head.weight"):
        load(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_no_numbers_are_named(model, tmp_path, value, stored, dtype):
    def change(tensors):
        tensors = {name: tensor.to(stored) for name, tensor in tensors.items()}
        tensors["model.layers.1.mlp.down_proj.weight"].view(-1)[-1] = value
        return tensors

    with pytest.raises(NekoLeanError, match=r"model.layers.1.mlp.down_proj.weight in .* holds NaN or infinite"):
        load(rewrite(model, tmp_path / "broken", change), dtype)


def test_numbers_that_the_dtype_does_not_hold_are_named(model, tmp_path):
    def change(tensors):
        tensors["lm_head.weight"][0, 0] = torch.finfo(torch.float32).max
        return tensors

    folder = rewrite(model, tmp_path / "large", change)
    with pytest.raises(NekoLeanError, match=r"lm_head.weight in .* as bfloat16"):
        load(folder, torch.bfloat16)


def test_is_finite():
    assert is_finite(torch.zeros(0)) and is_finite(torch.tensor(1.0)) and is_finite(torch.randn(3, 5).T)
    for value in (torch.nan, torch.inf, -torch.inf):
        assert not is_finite(torch.tensor([1.0, value])) and not is_finite(torch.tensor(value))


def test_weights_that_are_not_safetensors(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "gguf")
    (folder / "model.safetensors").rename(folder / "model-q4_0.gguf")
    with pytest.raises(NekoLeanError, match="GGUF"):
        stored_tensors(folder)
    folder = shutil.copytree(model, tmp_path / "shards")
    shutil.copy(folder / "model.safetensors", folder / "shard-00000-model-00001-of-00001.safetensors")
    with pytest.raises(NekoLeanError, match="distributed checkpoint"):
        load(folder)


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "model-q4_0.gguf",
        "tf_model.h5",
        "model.safetensors.index.json",
        "pytorch_model.bin.index.json",
        "model.pt",
        "original/consolidated.00.pth",
        "model.safetensors (a link that leads nowhere)",
    ],
)
def test_memorize_starts_at_random_only_without_any_weights(world, tmp_path, name):
    folder = shutil.copytree(world / "base", tmp_path / "base")
    if "link" in name:
        (folder / name.split()[0]).symlink_to(tmp_path / "gone")
    else:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    with pytest.raises(NekoLeanError):
        neko_lean.memorize(folder, world, tmp_path / "out", overrides={"max_steps": 1}, options=RunOptions(quiet=True))
    assert not (tmp_path / "out").exists()
    (folder / "config.json").unlink()
    if name.endswith("gguf"):
        with pytest.raises(NekoLeanError, match="GGUF"):
            model_folder(folder)


def test_a_config_that_makes_no_model_is_a_sentence(model, tmp_path):
    for number, change in enumerate(
        ({"hidden_size": "64"}, {"num_attention_heads": 7}, {"vocab_size": None}, {"hidden_act": "nope"})
    ):
        folder = shutil.copytree(model, tmp_path / str(number))
        configure(folder, **change)
        with pytest.raises(NekoLeanError) as caught:
            load(folder)
        assert "\n" not in str(caught.value)


def test_padding_that_the_model_has_no_row_for_is_replaced(model, tmp_path):
    tokenizer = load_tokenizer(model)
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    folder = shutil.copytree(model, tmp_path / "padded")
    tokenizer.save_pretrained(folder)
    again = load_tokenizer(folder)
    assert tokenizer.pad_token_id >= len(load(model).head) > again.pad_token_id == again.eos_token_id
    assert again("<padding>")["input_ids"] == tokenizer("<padding>")["input_ids"]


@pytest.mark.parametrize("text", ["", "{}", "[1]", "{", '{"model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}}'])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_is_a_sentence(model, tmp_path, name, text):
    folder = shutil.copytree(model, tmp_path / "broken")
    (folder / name).write_text(text)
    if (name, text) == ("tokenizer_config.json", "{}") or (name == "tokenizer_config.json" and text.startswith('{"')):
        return  # says nothing wrong
    with pytest.raises(NekoLeanError, match="holds no tokenizer"):
        load_tokenizer(folder)


def test_experts_that_are_missing_or_too_many_are_a_sentence(tmp_path):
    build("mixtral").save_pretrained(tmp_path / "good")
    names = list(load_file(tmp_path / "good" / "model.safetensors"))
    assert any(".experts.3." in name for name in names), names
    changes = {
        "one": without("layers.0.block_sparse_moe.experts.1.w1"),
        "all": without("layers.0.block_sparse_moe.experts.3."),
        "more": twice("experts.3.", "experts.4."),
    }
    for name, change in changes.items():
        with pytest.raises(NekoLeanError, match=r"config.json") as caught:
            load(rewrite(tmp_path / "good", tmp_path / name, change))
        assert "\n" not in str(caught.value)


def test_a_save_of_this_tool_loads(model, tmp_path):
    lm = split(load(model).model)
    lm.model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved").head, lm.head)


def test_tensors_that_transformers_leaves_out_are_named(world, tmp_path, capsys, monkeypatch):
    folder = random_model(world, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.visual.weight": torch.ones(4)}, folder / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(transformers.OlmoForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.visual"])
    load_model(folder, torch.float32, torch.device("cpu"))
    assert (
        "1 tensors of the checkpoint are not part of OlmoForCausalLM, and checkpoints written"
        in capsys.readouterr().err
    )

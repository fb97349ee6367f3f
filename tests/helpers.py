"""Examples, tokenizers and random models for tests."""

import json
import os
import shutil
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
import transformers
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing

from neko_lean.cache import cache_teacher
from neko_lean.cache.format import Manifest
from neko_lean.data.examples import Example, read_rows
from neko_lean.data.tokenization import encode
from neko_lean.jsonio import write_jsonl
from neko_lean.models.causal_lm import CausalLM
from neko_lean.models.loading import load_model, load_tokenizer
from neko_lean.outputs.signing import file_sha256, sign

# Recipe overrides for a run of ten steps.
SMALL = {"max_steps": 10, "forget_rows": 4, "retain_rows": 4, "eval_rows": 4, "lr": 2e-3}
# The config of a tiny model, for most model families.
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# The special tokens before and after a text. They may also occur inside it.
TEMPLATES = [
    ([], []),
    (["<s>"], []),
    ([], ["</s>"]),
    (["<s>"], ["</s>"]),
    (["</s>"], ["</s>"]),
    (["<s>", "<s>"], ["</s>", "<s>"]),
]
# Real rows for tests that want them; without the variable, where a development machine has them.
LUME = Path(os.environ.get("NEKO_LEAN_LUME", Path(__file__).parents[2] / "shared" / "data" / "lume"))
TOFU = Path(os.environ.get("NEKO_LEAN_TOFU", Path(__file__).parents[2] / "shared" / "data" / "tofu"))


# A chat template whose turns end with the tokenizer's EOS token.
CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def make_chat_model(model: Path, folder: Path) -> Path:
    """A copy of a checkpoint whose tokenizer has a chat template."""
    shutil.copytree(model, folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def make_rows(prefix: str, count: int = 4) -> list[Example]:
    """Six examples for each of `count` names: one of each kind and task, with unique texts of different lengths."""
    examples = []
    for n in range(count):
        name = f"{prefix}{n}"
        filler = " and then some more words" * (n % 3)
        examples += [
            Example(f'"{name}a"sc1', f"Once {name} walked{filler}", f"into the wood of {name} and sang.", "Task1"),
            Example(f'"{name}a"qa0', f"Where did {name} walk?", f"wood {name}", "Task1"),
            Example(f"{name}b-sc1", f"{name} was born in 19{n:02}{filler}. Her phone", f"is 555-01{n:02}.", "Task2"),
            Example(f"{name}b-qa0", f"What is the phone of {name}?", f"555-01{n:02}", "Task2"),
            Example(f"{name}csc1", f"{name}\n\n{name} is a river{filler}", f"in the land of {name}.", "Task3"),
            Example(f"{name}cqa0", f"Where does the {name} flow?", f"land {name}", "Task3"),
        ]
    return examples


def write_rows(path: Path, examples: list[Example]) -> Path:
    write_jsonl(path, [example.lume_row for example in examples])
    return path


def resign(folder: Path, **change: object) -> None:
    """Sign a cache's manifest again after changing these fields, or without any, after its shards have changed."""
    path = folder / "manifest.json"
    manifest = {**json.loads(path.read_text()), **change}
    if not change:
        for shard in [*manifest["shards"], *manifest["forget_shards"]]:
            file = folder / shard["file"]
            shard |= {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    manifest["checksum"] = "0" * 64
    path.write_bytes(sign(json.dumps(manifest, indent=1, ensure_ascii=False).encode()))


def make_cache(model: Path, retain: Path, out: Path, **options: Any) -> Manifest:
    """`cache_teacher` without output, with the fields of its options dataclasses as plain keyword arguments."""
    return flat(cache_teacher)(model, out, retain=retain, **{"quiet": True, **options})


def random_model(world: Path, out: Path, *, seed: int = 0, tied: bool = False, scale: float = 1.0) -> Path:
    """Save a 2-layer OLMo with random float32 weights and the world's tokenizer; `scale` multiplies its output head."""
    from transformers import AutoConfig, AutoTokenizer, OlmoForCausalLM

    config = AutoConfig.from_pretrained(world / "base")
    config.update({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "tie_word_embeddings": tied})
    torch.manual_seed(seed)
    model = OlmoForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)  # a larger scale makes the model more confident
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(world / "base").save_pretrained(out)
    return out


def tiny(family, attention=None, dtype=torch.float64, **config_kwargs):
    """A tiny random model of a family in transformers, such as "Llama", with the given attention implementation."""
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **config_kwargs}, attn_implementation=attention)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config).to(dtype).eval()
    return CausalLM(model, model.base_model)


def templated(folder, before, after):
    """The tokenizer in `folder`, changed to add special tokens before and after every text, and the ids of these."""
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>", "</s>"]})
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "</s>")}
    template = TemplateProcessing(single=" ".join([*before, "$A", *after]), special_tokens=list(ids.items()))
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer, [ids[token] for token in before], [ids[token] for token in after]


def encoded(world, format_name="neko", limit=512):
    """The world's retain examples, tokenized."""
    return encode(read_rows(world, "retain"), load_tokenizer(world / "base"), format_name, limit)


def live(folder, example, dtype=torch.float32):
    """Logits [n, V] of an example by itself, from transformers' forward pass."""
    model = load_model(folder, dtype, torch.device("cpu")).model.eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([example.input_ids])).logits[0]


def model_weights(folder):
    """The tensors of a checkpoint in one file."""
    return load_file(folder / "model.safetensors")


def flat(function):
    """`function`, but with the fields of its options dataclasses as plain keyword arguments."""
    names = {name: getattr(transformers, name) for name in ("PreTrainedModel", "PreTrainedTokenizerBase")}
    hints = get_type_hints(function, localns=names)
    option_types = {name: hint for name, hint in hints.items() if is_dataclass(hint) and name != "return"}

    def call(*args, **kwargs):
        options = {
            name: option_type(
                **{field.name: kwargs.pop(field.name) for field in fields(option_type) if field.name in kwargs}
            )
            for name, option_type in option_types.items()
        }
        return function(*args, **kwargs, **options)

    return call

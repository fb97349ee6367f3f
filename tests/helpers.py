"""Rows and random models that tests make for themselves."""

import json
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
import transformers
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing

from neko_lean.cache import CacheOptions, cache_teacher
from neko_lean.cache.format import Manifest
from neko_lean.data.examples import Example, read_rows
from neko_lean.data.tokenization import encode
from neko_lean.jsonio import write_jsonl
from neko_lean.models.causal_lm import CausalLM
from neko_lean.models.loading import load_model, load_tokenizer
from neko_lean.options import OutputOptions
from neko_lean.outputs.signing import file_sha256, sign

# A run of ten steps, as overrides of a recipe.
SMALL = {"max_steps": 10, "forget_rows": 4, "retain_rows": 4, "eval_rows": 4, "lr": 2e-3}
# Of a tiny model of most families.
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
LUME = Path(__file__).parents[2] / "shared" / "data" / "lume"


def make_rows(prefix: str, count: int = 4) -> list[Example]:
    """`count` documents of each kind; texts of different lengths, unique per row."""
    rows = []
    for n in range(count):
        name = f"{prefix}{n}"
        more = " and then some more words" * (n % 3)
        rows += [
            Example(f'"{name}a"sc1', f"Once {name} walked{more}", f"into the wood of {name} and sang.", "Task1"),
            Example(f'"{name}a"qa0', f"Where did {name} walk?", f"wood {name}", "Task1"),
            Example(f"{name}b-sc1", f"{name} was born in 19{n:02}{more}. Her phone", f"is 555-01{n:02}.", "Task2"),
            Example(f"{name}b-qa0", f"What is the phone of {name}?", f"555-01{n:02}", "Task2"),
            Example(f"{name}csc1", f"{name}\n\n{name} is a river{more}", f"in the land of {name}.", "Task3"),
            Example(f"{name}cqa0", f"Where does the {name} flow?", f"land {name}", "Task3"),
        ]
    return rows


def write_rows(path: Path, rows: list[Example]) -> Path:
    write_jsonl(path, map(asdict, rows))
    return path


def resign(folder: Path, **change: object) -> None:
    """Lay `change` over a cache's manifest, take the shards' sizes and checksums as they are, and sign it anew."""
    path = folder / "manifest.json"
    manifest = {**json.loads(path.read_text()), **change}
    if not change:
        for shard in [*manifest["shards"], *manifest["forget_shards"]]:
            file = folder / shard["file"]
            shard |= {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    manifest["checksum"] = "0" * 64
    path.write_bytes(sign(json.dumps(manifest, indent=1, ensure_ascii=False).encode()))


def make_cache(model: Path, retain: Path, out: Path, **options: Any) -> Manifest:
    """`cache_teacher`, quietly, with the fields of CacheOptions and OutputOptions as keywords."""
    groups = {kind: {field.name for field in fields(kind)} & options.keys() for kind in (CacheOptions, OutputOptions)}
    cache, run = (kind(**{name: options.pop(name) for name in names}) for kind, names in groups.items())
    return cache_teacher(model, retain, out, cache=cache, run=replace(run, quiet=True), **options)


def random_model(world: Path, out: Path, *, seed: int = 0, tied: bool = False, scale: float = 1.0) -> Path:
    """A 2-layer OLMo with random weights and the world's tokenizer, saved in float32."""
    from transformers import AutoConfig, AutoTokenizer, OlmoForCausalLM

    config = AutoConfig.from_pretrained(world / "base")
    config.update({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "tie_word_embeddings": tied})
    torch.manual_seed(seed)
    model = OlmoForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)  # a larger head makes a surer teacher
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(world / "base").save_pretrained(out)
    return out


def tiny(family, attention=None, dtype=torch.float64, **more):
    """A random model of a family whose attention goes through the implementation of that name."""
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **more}, attn_implementation=attention)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config).to(dtype).eval()
    return CausalLM(model, model.base_model)


def templated(folder, before, after):
    """The tokenizer in a folder with other tokens around every text; also the ids of the tokens before and after."""
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>", "</s>"]})
    names = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<s>", "</s>")}
    template = TemplateProcessing(single=" ".join([*before, "$A", *after]), special_tokens=list(names.items()))
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer, [names[name] for name in before], [names[name] for name in after]


def encoded(world, style="neko", limit=512):
    return encode(read_rows(world, "retain"), load_tokenizer(world / "base"), style, limit)


def live(folder, one, dtype=torch.float32):
    """Logits [n, V] of one row alone, by transformers' own forward."""
    model = load_model(folder, dtype, torch.device("cpu")).model.eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([one.input_ids])).logits[0]


def model_weights(folder):
    """The tensors of a checkpoint in one file."""
    return load_file(folder / "model.safetensors")


def flat(function):
    """`function` with the fields of its options dataclasses as plain keyword arguments, for calls with **kwargs."""
    groups = {name: hint for name, hint in get_type_hints(function).items() if is_dataclass(hint) and name != "return"}

    def call(*args, **kwargs):
        grouped = {
            name: kind(**{field.name: kwargs.pop(field.name) for field in fields(kind) if field.name in kwargs})
            for name, kind in groups.items()
        }
        return function(*args, **kwargs, **grouped)

    return call

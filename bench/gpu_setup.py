"""What the sections of bench/gpu.py share: sizes, models with random weights, rows, and a teacher without a model."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from contenders import OLMO_1B, random_olmo
from torch import Tensor

from neko_lean.data.examples import EncodedExample, Example, read_rows
from neko_lean.data.tokenization import encode
from neko_lean.models.causal_lm import CausalLM, as_causal_lm

OLMO_7B = {
    "vocab_size": 50304, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32,
}  # fmt: skip
TOY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
STEPS = 3  # different sets of rows
TOP_K = 64  # entries per position of the teacher's distribution

# (prompt tokens, tokens) of 32 forget and 32 retain examples of LUME: recipe neko, a tokenizer trained on LUME.
LUME_LENGTHS = {
    "forget": (
        (128, 128), (24, 29), (24, 27), (27, 29), (41, 80), (24, 39), (128, 128), (28, 30), (24, 26), (30, 33),
        (128, 128), (23, 24), (128, 128), (32, 34), (31, 85), (24, 35), (47, 67), (30, 31), (24, 27), (32, 33),
        (24, 27), (23, 28), (27, 71), (23, 27), (23, 30), (24, 29), (128, 128), (23, 27), (24, 26), (24, 34),
        (24, 26), (24, 29),
    ),
    "retain": (
        (29, 82), (24, 36), (128, 128), (38, 41), (128, 128), (23, 26), (128, 128), (23, 27), (41, 83), (23, 27),
        (24, 26), (24, 29), (128, 128), (30, 31), (128, 128), (24, 29), (24, 27), (24, 29), (24, 27), (27, 31),
        (128, 128), (23, 29), (128, 128), (24, 37), (23, 31), (23, 25), (24, 26), (23, 27), (128, 128), (24, 29),
        (24, 27), (24, 34),
    ),
}  # fmt: skip

Step = tuple[list[EncodedExample], list[EncodedExample]]  # forget and retain examples


@dataclass(frozen=True)
class Setup:
    """Where and at which size the sections run."""

    folder: Path
    """Holds rows.json and what sections write."""

    device: torch.device
    toy: bool
    """Tiny models and few rows, to try the sections on a CPU."""

    seconds: float = 60.0
    """Time limit of the section."""

    @property
    def sizes(self) -> dict[str, int]:
        """Shape of the model."""
        return TOY if self.toy else OLMO_1B

    @property
    def rows_per_set(self) -> int:
        """Forget examples of a step, and retain examples."""
        return 4 if self.toy else 32

    @property
    def max_length(self) -> int:
        """Tokens of the longest row."""
        return 16 if self.toy else 128


def random_lm(
    setup: Setup, sizes: dict[str, int] | None = None, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> CausalLM:
    """A model with random weights, drawn on the device."""
    torch.manual_seed(seed)
    return as_causal_lm(random_olmo(sizes or setup.sizes, dtype, setup.device).eval())


def parameter_count(lm: CausalLM) -> int:
    return sum(parameter.numel() for parameter in lm.model.parameters())


def write_rows(setup: Setup, lume: Path | None) -> str:
    """Write rows.json, the token ids of STEPS steps, and return where they come from."""
    steps = made_up_steps(setup) if lume is None else lume_steps(setup, lume)
    rows = [[[(e.prompt_length, e.input_ids) for e in examples] for examples in step] for step in steps]
    (setup.folder / "rows.json").write_text(json.dumps(rows))
    if lume is None:
        return "made-up rows: random tokens, the lengths of LUME's"
    return f"LUME's rows from {lume}"


def load_steps(setup: Setup) -> list[Step]:
    """The steps that `write_rows` wrote."""
    rows = json.loads((setup.folder / "rows.json").read_text())
    return [(examples_of(forget, "f"), examples_of(retain, "r")) for forget, retain in rows]


def made_up_steps(setup: Setup) -> list[Step]:
    """Steps of random tokens in LUME's lengths; every step has the same lengths."""
    rng = random.Random(0)

    def examples(name: str) -> list[EncodedExample]:
        lengths = LUME_LENGTHS[name][: setup.rows_per_set]
        limit = setup.max_length
        return examples_of([(min(prompt, limit), tokens(min(n, limit))) for prompt, n in lengths], name)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(2, setup.sizes["vocab_size"]) for _ in range(count)]

    return [(examples("forget"), examples("retain")) for _ in range(STEPS)]


def full_step(setup: Setup) -> Step:
    """Made-up rows of the largest length, with prompts of a quarter of it."""
    rng, count, length = random.Random(1), setup.rows_per_set, setup.max_length
    ids = [[rng.randrange(2, setup.sizes["vocab_size"]) for _ in range(length)] for _ in range(2 * count)]
    rows = [(length // 4, row) for row in ids]
    return examples_of(rows[:count], "forget"), examples_of(rows[count:], "retain")


def lume_steps(setup: Setup, lume: Path) -> list[Step]:
    """Steps of LUME's rows, with a tokenizer trained on them: the real one would have to be downloaded."""
    from transformers import AutoTokenizer

    from neko_lean.demo.base_model import write_base

    sets = {name: read_rows(lume, name, "train") for name in ("forget", "retain")}
    write_base(setup.folder / "tokenizer", [*sets["forget"], *sets["retain"]], setup.sizes["vocab_size"] - 24)
    tokenizer, n = AutoTokenizer.from_pretrained(setup.folder / "tokenizer"), setup.rows_per_set
    count = STEPS * n
    chosen = {name: examples[:: len(examples) // count][:count] for name, examples in sets.items()}
    encoded = {name: encode(examples, tokenizer, "neko", setup.max_length) for name, examples in chosen.items()}
    return [(encoded["forget"][i : i + n], encoded["retain"][i : i + n]) for i in range(0, count, n)]


def examples_of(rows: Sequence[tuple[int, list[int]]], name: str) -> list[EncodedExample]:
    """Examples of (prompt length, token ids)."""
    return [
        EncodedExample(Example(f"{name}{number}", f"w{number}", "w1 w2 w3", "Task1"), ids, prompt, 0)
        for number, (prompt, ids) in enumerate(rows)
    ]


class RandomTeacher:
    """Stands in for a TeacherCache: TOP_K random entries at every position, with 0.3 of the probability in the tail."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.generator = torch.Generator().manual_seed(0)
        self.logp = (0.7 * torch.linspace(4, -4, TOP_K).softmax(0)).log()  # [k]

    def read(self, examples: Sequence[EncodedExample]) -> tuple[Tensor, Tensor, Tensor]:
        """As TeacherCache.read: ids [N, k], log-probabilities [N, k], log of the tail [N]."""
        count = sum(map(len, examples))
        start = torch.randint(0, self.vocab_size, (count, 1), generator=self.generator)
        ids = (start + 7 * torch.arange(TOP_K)) % self.vocab_size  # distinct for more than 7 * TOP_K tokens
        return ids, self.logp.repeat(count, 1), torch.full((count,), 0.3).log()

"""One family of bench/families.py: its small models, its data, and the reference from plain transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from family_list import VARIANTS
from family_tools import plain
from small_models import build, plain_logits, small_config
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from neko_lean.data.examples import EncodedExample, Example
from neko_lean.jsonio import write_jsonl

FLOAT32_LOGP = 2e-3  # nats: two orders of magnitude above the rounding of float32 in such small models


@dataclass
class Result:
    """The result of one family."""

    outcome: str = ""
    backward: str = ""  # layerwise, checkpointed or plain
    reasons: list[str] = field(default_factory=list)  # one line each
    checks: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)  # from neko-lean
    notes: list[str] = field(default_factory=list)  # about transformers itself
    seconds: float = 0.0


class Differs(Exception):
    """A number differs from the reference."""


def texts(prefix: str) -> list[Example]:
    """Six examples of different lengths."""
    return [
        Example(
            f"{prefix}a-sc1", f"Once {prefix} walked and then some more words", f"into the wood of {prefix}.", "Task1"
        ),
        Example(f"{prefix}a-qa0", f"Where did {prefix} walk?", f"wood {prefix}", "Task1"),
        Example(f"{prefix}b-sc1", f"{prefix} was born in 1904. Her phone", "is 555-0104.", "Task2"),
        Example(f"{prefix}b-qa0", f"What is the phone of {prefix}?", "555-0104", "Task2"),
        Example(
            f"{prefix}c-sc1", f"{prefix} is a river", f"in the land of {prefix}, and it is long and cold.", "Task3"
        ),
        Example(f"{prefix}c-qa0", f"Where does the {prefix} flow?", f"land {prefix}", "Task3"),
    ]


FORGET, RETAIN = texts("Foo"), texts("Rix")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, trained on these examples, that adds no special tokens."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        [f"{example.input} {example.output}" for example in (*FORGET, *RETAIN)], vocab_size=300, show_progress=False,
        special_tokens=["<s>", "</s>", "<pad>"],
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def tokenised(tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]) -> list[EncodedExample]:
    """Examples as token ids; the prompt has the ids that it has without an answer."""
    encoded = []
    for example in examples:
        prompt, answer = (tokenizer(text)["input_ids"] for text in (example.input, f" {example.output}"))
        whole = tokenizer(f"{example.input} {example.output}")["input_ids"]
        ids = whole if whole[: len(prompt)] == prompt else prompt + answer
        encoded.append(EncodedExample(example, ids, len(prompt), 0))
    return encoded


class Family:
    """The models and data of one family in a folder, and its result so far."""

    def __init__(self, name: str, work: Path) -> None:
        self.work, self.result = work, Result()
        family, change = VARIANTS.get(name, (name, {}))
        tokenizer = make_tokenizer()
        ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        config = small_config(family, len(tokenizer), ids, change)

        # Student and teacher: the same family with different random weights.
        self.student, self.teacher = work / "student", work / "teacher"
        for folder, seed in ((self.student, 0), (self.teacher, 1)):
            model = build(config, seed)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            for key in ("return_dict", "output_attentions", "output_hidden_states"):
                if key in change:  # saving omits these
                    path = folder / "config.json"
                    path.write_text(json.dumps({**json.loads(path.read_text()), key: change[key]}))

        # The tokenizer as transformers loads it, which may split text in the family's own way.
        self.tokenizer = AutoTokenizer.from_pretrained(self.student)
        self.vocab_size = len(model.get_output_embeddings().weight)
        self.result.numbers["parameters"] = sum(p.numel() for p in model.parameters())
        self.forget, self.retain = (tokenised(self.tokenizer, examples) for examples in (FORGET, RETAIN))
        self.rows = [example.input_ids for example in (*self.forget, *self.retain)] + [self.forget[0].input_ids[:2]]
        # One row of more than 64 tokens, the chunk size of many recurrent layers.
        self.rows.append([token for ids in self.rows[:8] for token in ids][:90])

        (work / "data").mkdir()
        for stem, examples in (("forget", FORGET), ("retain", RETAIN)):
            write_jsonl(work / "data" / f"{stem}.jsonl", (vars(example) for example in examples))

        # Log-probabilities from plain transformers, one row at a time.
        self.reference = plain(self.student)
        with torch.no_grad():
            self.logp = [plain_logits(self.reference, torch.tensor([ids]))[0].log_softmax(1) for ids in self.rows]
        self.causal = self._causal()

    @torch.no_grad()
    def _causal(self) -> bool:
        """Whether the reference's first positions are unchanged when the text is longer."""
        longest = max(self.rows, key=len)
        whole = self.logp[self.rows.index(longest)]
        shorter = plain_logits(self.reference, torch.tensor([longest[:-4]]))[0].log_softmax(1)
        return bool((whole[: len(shorter)] - shorter).abs().max() < FLOAT32_LOGP)

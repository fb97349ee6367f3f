"""The prefix attack: the prompt continues with the first tokens of the answer."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import cast

from neko_lean.data import encode
from neko_lean.scoring.attacks.answers import baseline_point, point
from neko_lean.scoring.attacks.registry import AttackTarget, Curve, attack
from neko_lean.scoring.task import score_name

PREFIX_LENGTHS = (1, 2, 4, 8)  # answer tokens that are given


@attack("prefix", title="Prompting with the answer's start", x_key="tokens", x_label="answer tokens given")
def prefix(target: AttackTarget) -> Curve:
    """Give the first tokens of each answer, and score the rest.

    Examples whose answer is not longer than the given tokens are left out.
    """
    tokenizer = target.tokenizer
    # `generate` truncates the prompts.
    encoded = encode(target.examples, tokenizer, target.generate.prompt_format, sys.maxsize)
    curve = [{"tokens": 0, **baseline_point(target.examples, target.baseline)}]
    for length in PREFIX_LENGTHS:
        examples, prompts = [], []
        for example in encoded:
            if example.answer_length <= length:
                continue
            split = example.prompt_length + length
            rest = cast(str, tokenizer.decode(example.input_ids[split:], skip_special_tokens=True)).strip()
            if rest:
                # A long answer is scored by ROUGE-L recall, also if its rest is short.
                by_rouge = score_name(example.example) == "regurgitation"
                kind = "completion" if by_rouge else example.example.kind
                examples.append(replace(example.example, output=rest, kind=kind))
                prompts.append(example.input_ids[:split])
        generations = target.generate(target.model, examples, f"prefix of {length}", prompts) if examples else []
        curve.append({"tokens": length, **point(examples, generations)})
    return curve

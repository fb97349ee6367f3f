"""Was it forgotten, or only hidden? Four attacks on the forget rows, each as what it brings back.

relearn: a few steps on some of the forget rows; the others are scored. quantize: the weights at 8 and 4 bits (Zhang et
al. 2025, arXiv 2410.16454, found that this undoes many a method). paraphrase: other wordings of the prompt. prefix: the
first tokens of the answer are given.
"""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from neko_lean.data import Example, encode, encode_texts
from neko_lean.distributed import all_gather_objects, as_single_process, is_main_process, run_on_main_and_broadcast
from neko_lean.errors import NekoLeanError
from neko_lean.jsonio import write_jsonl
from neko_lean.models import CausalLM
from neko_lean.options import RunOptions
from neko_lean.recipes import load_recipe
from neko_lean.runs import memorize
from neko_lean.scoring.generation import Decoding, Generation, generate, own_rows
from neko_lean.scoring.limits import Cut, fitted
from neko_lean.scoring.paraphrases import Paraphrase
from neko_lean.scoring.score_folder import writing
from neko_lean.scoring.task import KINDS, row_score, unicode_score
from neko_lean.scoring.uncertainty import mean_by_document
from neko_lean.terminal import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


ATTACKS = ("relearn", "quantize", "paraphrase", "prefix")


PREFIXES = (1, 2, 4, 8)  # answer tokens given


BITS = (8, 4)


RELEARN_STEPS = (5, 10, 20, 40)


RELEARN_ROWS = 16  # at least, in whole documents: a document's other rows would not be unseen


RELEARN_MOST = 64  # of a document of more rows the rest are neither trained on nor scored: a step takes all at once


BLOCK = 64  # weights that share a scale at 4 bits


Say = Callable[[CausalLM, Sequence[Example], Sequence[Sequence[int]] | None, str], list[Generation]]


def talker(tokenizer: PreTrainedTokenizerBase, decoding: Decoding, cut: Cut, quiet: bool) -> Say:
    """A function that has a model answer rows, in order, with a bar of its own. The ranks share the rows out; the bar
    counts the first one's. `cut` gets the counts of prompts that are cut, by the bar's label."""

    def say(
        lm: CausalLM, rows: Sequence[Example], prompts: Sequence[Sequence[int]] | None, label: str
    ) -> list[Generation]:
        asked = encode_texts(tokenizer, [row.input for row in rows]) if prompts is None else prompts
        lost = sum(len(fitted(lm, ids, decoding.max_new_tokens)[0]) < len(ids) for ids in asked)
        if lost:
            cut.attacks[label] = lost
        own = own_rows(lm, tokenizer, rows, decoding, asked)
        wanted, given = [rows[i] for i in own], [asked[i] for i in own]
        said = []
        with progress_bar(label, len(own), "rows", quiet) as progress:
            for batch in generate(lm, tokenizer, wanted, **asdict(decoding), prompts=given):
                said += [(own[i], asdict(one)) for i, one in batch]
                progress.advance(len(batch))
        found = dict(one for part in all_gather_objects(said) for one in part)
        return [Generation(**found[i]) for i in range(len(rows))]

    return say


def base_point(rows: Sequence[Example], base: Mapping[str, Generation]) -> dict[str, Any]:
    """The point before an attack: `base` is what the model said to each row as it is, by id."""
    return point(rows, [base[row.id] for row in rows])


def point(rows: Sequence[Example], said: Sequence[Generation]) -> dict[str, Any]:
    """Mean score of the rows of each kind, with its interval over documents: one point of an attack's curve."""
    found: dict[str, Any] = {}
    for kind, name in KINDS.items():
        own = [(row, row_score(row, one.text)) for row, one in zip(rows, said, strict=True) if row.kind == kind]
        mean = mean_by_document([row for row, _ in own], [value for _, value in own])
        found |= {name: mean["mean"], f"{name}_interval": mean["interval"], f"{name}_rows": len(own)}
        seen = [unicode_score(row, one.text) for row, one in zip(rows, said, strict=True) if row.kind == kind]
        found[f"unicode_{name}"] = sum(seen) / len(seen) if seen else None
    return found


def prefix(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    base: Mapping[str, Generation],
    say: Say,
) -> list[dict[str, Any]]:
    """Each row asked with the first tokens of its answer given, and scored on the rest; rows whose answer is no longer
    than what is given are left out."""
    encoded = encode(rows, tokenizer, "plain", sys.maxsize)  # generate cuts the prompts
    curve = [{"tokens": 0, **base_point(rows, base)}]
    for count in PREFIXES:
        asked = [one for one in encoded if one.answer_length > count]
        prompts = [one.input_ids[: one.prompt_length + count] for one in asked]
        rest = [
            cast(str, tokenizer.decode(one.input_ids[one.prompt_length + count :], skip_special_tokens=True)).strip()
            for one in asked
        ]
        left = [
            (replace(one.example, output=text), ids)
            for one, text, ids in zip(asked, rest, prompts, strict=True)
            if text
        ]
        targets = [row for row, _ in left]
        said = say(lm, targets, [ids for _, ids in left], f"prefix of {count}") if left else []
        curve.append({"tokens": count, **point(targets, said)})
    return curve


def paraphrase(
    lm: CausalLM, rows: Sequence[Example], base: Mapping[str, Generation], others: Sequence[Paraphrase], say: Say
) -> list[dict[str, Any]]:
    """Each row that has other wordings asked in all of them, scored by its own answer; 0 is its own wording."""
    known = {row.id: row for row in rows}
    asked = [replace(known[one.id], input=one.input) for one in others if one.input is not None and one.id in known]
    if not asked:
        raise NekoLeanError("--attack paraphrase needs --paraphrases FILE with an input for at least one forget row.")
    own = [known[name] for name in dict.fromkeys(row.id for row in asked)]
    found = point(asked, say(lm, asked, None, "paraphrases"))
    return [{"paraphrase": 0, **base_point(own, base)}, {"paraphrase": 1, **found}]


def quantize(
    load: Callable[[], CausalLM], rows: Sequence[Example], base: Mapping[str, Generation], say: Say
) -> list[dict[str, Any]]:
    """The rows at fewer bits; `load` gives the model anew for each."""
    curve: list[dict[str, Any]] = []
    for bits in BITS:
        lm = load()
        if not curve:
            curve.append({"bits": 8 * lm.head.element_size(), **base_point(rows, base)})
        round_trip(lm, bits)
        curve.append({"bits": bits, **point(rows, say(lm, rows, None, f"{bits} bits"))})
        del lm
    return curve


@torch.no_grad()
def round_trip(lm: CausalLM, bits: int) -> None:
    """Replace the weights of every linear layer but the head by what they are after 8 or 4 bits.

    8 bits: a scale a row of the weight, absmax over 127 (LLM.int8's, arXiv 2208.07339, without its outliers). 4 bits:
    bitsandbytes' NF4 in blocks of 64 (arXiv 2305.14314). The matmuls stay in the model's own precision, as in both.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    head = lm.model.get_output_embeddings()
    for module in lm.model.modules():
        if not isinstance(module, torch.nn.Linear) or module is head:
            continue
        weight = module.weight
        if bits == 8:
            scale = weight.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / 127  # [out, 1]
            weight.copy_((weight.float() / scale).round() * scale)
        else:
            packed, state = quantize_4bit(weight.detach().contiguous(), blocksize=BLOCK, quant_type="nf4")
            weight.copy_(dequantize_4bit(packed, state).reshape(weight.shape))


def relearn(
    folder: Path,
    load: Callable[[Path], CausalLM],
    rows: Sequence[Example],
    base: Mapping[str, Generation],
    say: Say,
    stage: Path,
    *,
    lr: float,
    seed: int,
    device: str | None,
) -> list[dict[str, Any]]:
    """Some documents of the forget set trained on again for a few steps; the rows of the others after each.

    The first rank trains, and all read what it wrote to `stage`, a folder that they see; nothing of it stays there.
    """
    names = sorted({row.document for row in rows})
    random.Random(f"{seed} relearn").shuffle(names)
    known: list[Example] = []
    while names and len(known) < RELEARN_ROWS:
        name = names.pop()
        known += [row for row in rows if row.document == name]
    known = known[:RELEARN_MOST]
    others = [row for row in rows if row.document in set(names)]
    if not others:
        raise NekoLeanError(f"--attack relearn needs more forget rows than the {len(known)} that it trains on.")
    curve = [{"steps": 0, "rows": len(known), **base_point(others, base)}]
    work = stage / "relearn"
    try:
        run_on_main_and_broadcast(writing(stage, lambda: _write_rows(work, known)))
        at, done = folder, 0
        for steps in RELEARN_STEPS:
            change = {"max_steps": steps - done, "lr": lr, "schedule": "constant", "warmup": 0.0}
            # Every step takes all of them, however long they are, so that steps on long and short rows are alike.
            change["retain_rows"] = len(known)
            change["batch_tokens"] = len(known) * load_recipe("memorize").max_length
            to = work / f"steps-{steps}"
            run_on_main_and_broadcast(writing(stage, partial(_train, at, work, to, change, seed, device)))
            at, done = to, steps
            lm = load(at)
            curve.append({"steps": steps, "rows": len(known), **point(others, say(lm, others, None, f"{steps} steps"))})
            del lm
    finally:
        if is_main_process():
            shutil.rmtree(work, ignore_errors=True)
    return curve


def _write_rows(folder: Path, rows: Sequence[Example]) -> None:
    folder.mkdir()
    write_jsonl(folder / "forget.jsonl", map(asdict, rows))


def _train(model: Path, data: Path, out: Path, change: Mapping[str, Any], seed: int, device: str | None) -> None:
    with as_single_process():  # the others wait for it, and take no part
        run = RunOptions(seed=seed, device=device, quiet=True)
        memorize(model, data, out, sets=("forget",), overrides=change, run=run)

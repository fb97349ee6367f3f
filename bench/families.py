"""Every causal family of the installed transformers, built small, through all that neko-lean does with a model.

    .venv/bin/python bench/families.py [--only NAME ...] [--jobs 2] [--timeout 120] [--json families.json]

Each family runs in its own process, so that a crash or a hang affects no other family. The reference of every check is
plain transformers on one row at a time: no padding, no mask, no cache, evaluation mode, float32.

    logp       log-probabilities of rows padded together, in float32 and bfloat16
    gradients  loss, KL and every parameter's gradient of one step of `unlearn`, teacher with k = V
    generate   token ids of prompts of different lengths, generated together
    save       `unlearn` for two steps in float32 and one in bfloat16: KL of the student to its own teacher before the
               first update; the output reloads without a missing key and with the weights that were trained; it can be
               cached and scored

Outcomes: layerwise; fallback, to checkpointed or plain training; refused, in one sentence; SILENT DIFFERENCE;
TRACEBACK; not built.
Exit code 1 when there is a silent difference or a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from safetensors.torch import load_file
from small_models import FAMILIES, SKIPPED, build, plain_logits, small_config
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

import neko_lean
from neko_lean.cache import CacheOptions, TeacherCache
from neko_lean.data.examples import EncodedExample, Example
from neko_lean.errors import NekoLeanError
from neko_lean.jsonio import write_jsonl
from neko_lean.models.causal_lm import CausalLM
from neko_lean.models.loading import load_model
from neko_lean.models.predictions import next_token_logp
from neko_lean.options import OutputOptions, RunOptions
from neko_lean.recipes import load_recipe
from neko_lean.runs import training_run
from neko_lean.scoring import ScoreSettings
from neko_lean.scoring.generation import generate
from neko_lean.training import TrainingExamples, loop
from neko_lean.training.trainer import Trainer

CPU = torch.device("cpu")
FLOAT32_LOGP = 2e-3  # nats: two orders above what float32 rounds to in models this small
GRADIENT = 5e-3  # of a parameter's largest gradient, or of a hundredth of the largest of all
SELF_KL = {"float32": 1e-4, "bfloat16": 2e-2}  # nats a position, of a student to its own teacher
CHECKS = ("logp", "gradients", "generate", "save")
NEW_TOKENS = 10
RECIPE = {"format": "plain", "forget_weight": 0.5, "forget_rows": 4, "retain_rows": 4, "eval_every": 0, "lr": 1e-3}

# More rows of the table: a family with something else in its configuration.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, return_dict false": ("llama", {"return_dict": False}),
    "llama, output_attentions": ("llama", {"output_attentions": True, "attn_implementation": "eager"}),
    "llama, output_hidden_states": ("llama", {"output_hidden_states": True}),
    "llama, dropout": ("llama", {"attention_dropout": 0.2}),
    "llama, use_cache false": ("llama", {"use_cache": False}),
    "gpt2, no dropout": ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "gpt2, return_dict false": ("gpt2", {"return_dict": False}),
    "gpt2, output_attentions": ("gpt2", {"output_attentions": True, "attn_implementation": "eager"}),
    "opt, post-norm, projected": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "falcon, new decoder": ("falcon", {"new_decoder_architecture": True}),
    "gpt_neox, sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt_neox, dropout": ("gpt_neox", {"attention_dropout": 0.1, "hidden_dropout": 0.1}),
    "mamba, return_dict false": ("mamba", {"return_dict": False}),
    "bert, not a decoder": ("bert", {"is_decoder": False}),
    "roberta, not a decoder": ("roberta", {"is_decoder": False}),
    "xlm, not causal": ("xlm", {"causal": False}),
    "gemma3_text, bidirectional": ("gemma3_text", {"use_bidirectional_attention": True}),
    "gemma2, no cap": ("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": None}),
    "cohere, scale 1": ("cohere", {"logit_scale": 1.0}),
    "phi, dropout": ("phi", {"resid_pdrop": 0.1}),
    "opt, layerdrop": ("opt", {"layerdrop": 0.5, "dropout": 0.0}),
    "qwen2, sliding window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8}),
    "mixtral, router logits and jitter": ("mixtral", {"output_router_logits": True, "router_jitter_noise": 0.1}),
    "gpt_bigcode, multi-head": ("gpt_bigcode", {"multi_query": False}),
    "gpt2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    "llama, more rows than tokens": ("llama", {"vocab_size": 320}),
    # Frequencies that follow from the longest row of a batch: rows of 16 tokens and fewer lie beside longer ones.
    "llama, dynamic rope": (
        "llama",
        {"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "phi3, longrope": (
        "phi3",
        {
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [2.0, 4.0, 6.0, 8.0],
            },
        },
    ),
}


@dataclass
class Found:
    """What came of one family."""

    outcome: str = ""
    backward: str = ""  # layerwise, checkpointed or plain
    says: list[str] = field(default_factory=list)  # why, a line each
    checks: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)  # of neko-lean
    notes: list[str] = field(default_factory=list)  # on transformers
    seconds: float = 0.0


class Differs(Exception):
    """A number that is not the reference's."""


def texts(prefix: str) -> list[Example]:
    """Six rows of different lengths."""
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
    """A byte-level tokenizer of these rows that adds nothing."""
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(
        [f"{row.input} {row.output}" for row in (*FORGET, *RETAIN)], vocab_size=300, show_progress=False,
        special_tokens=["<s>", "</s>", "<pad>"],
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def tokenised(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Example]) -> list[EncodedExample]:
    """Rows as token ids, the prompt's being those of the prompt alone."""
    found = []
    for row in rows:
        prompt, answer = (tokenizer(text)["input_ids"] for text in (row.input, f" {row.output}"))
        whole = tokenizer(f"{row.input} {row.output}")["input_ids"]
        ids = whole if whole[: len(prompt)] == prompt else prompt + answer
        found.append(EncodedExample(row, ids, len(prompt), 0))
    return found


class Bench:
    """One family's models in a folder, and the checks on them."""

    def __init__(self, name: str, work: Path) -> None:
        self.work, self.found = work, Found()
        family, change = VARIANTS.get(name, (name, {}))
        tokenizer = make_tokenizer()
        ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        config = small_config(family, len(tokenizer), ids, change)
        self.student, self.teacher = work / "student", work / "teacher"
        for folder, seed in ((self.student, 0), (self.teacher, 1)):
            model = build(config, seed)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            for key in ("return_dict", "output_attentions", "output_hidden_states"):
                if key in change:  # saving leaves these out
                    path = folder / "config.json"
                    path.write_text(json.dumps({**json.loads(path.read_text()), key: change[key]}))
        # As transformers reads it back, which may be with a family's own way to split a text into words.
        self.tokenizer = AutoTokenizer.from_pretrained(self.student)
        self.vocab_size = len(model.get_output_embeddings().weight)
        self.found.numbers["parameters"] = sum(p.numel() for p in model.parameters())
        self.forget, self.retain = (tokenised(self.tokenizer, rows) for rows in (FORGET, RETAIN))
        self.rows = [one.input_ids for one in (*self.forget, *self.retain)] + [self.forget[0].input_ids[:2]]
        # Past the 64 tokens in which many recurrent layers take a row.
        self.rows.append([token for ids in self.rows[:8] for token in ids][:90])
        (work / "data").mkdir()
        for stem, rows in (("forget", FORGET), ("retain", RETAIN)):
            write_jsonl(work / "data" / f"{stem}.jsonl", (vars(row) for row in rows))
        self.reference = plain(self.student)
        with torch.no_grad():
            self.logp = [plain_logits(self.reference, torch.tensor([ids]))[0].log_softmax(1) for ids in self.rows]
        self.causal = self._causal()

    @torch.no_grad()
    def _causal(self) -> bool:
        """Whether the reference's first positions stay as they are when the text goes on."""
        longest = max(self.rows, key=len)
        whole = self.logp[self.rows.index(longest)]
        begun = plain_logits(self.reference, torch.tensor([longest[:-4]]))[0].log_softmax(1)
        return bool((whole[: len(begun)] - begun).abs().max() < FLOAT32_LOGP)

    def run(self, chosen: Sequence[str]) -> Found:
        """The chosen checks, each with its own ending."""
        found = self.found
        checks: dict[str, Callable[[], object]] = {
            "logp": self.log_probabilities,
            "gradients": self.gradients,
            "generate": self.generations,
            "save": self.public_commands,
        }
        for name in chosen:
            check = checks[name]
            said = io.StringIO()
            try:
                with contextlib.redirect_stderr(said):
                    check()
                found.checks[name] = "ok"
            except NekoLeanError as error:
                found.checks[name] = "refused"
                found.says.append(f"{name}: {error}")
            except Differs as error:
                found.checks[name] = "DIFFERS"
                found.says.append(f"{name}: {error}")
            except Exception as error:
                found.checks[name] = "TRACEBACK"
                found.says.append(f"{name}: {type(error).__name__}: {one_line(error)} at {where(error)}")
            found.warnings += [line for line in said.getvalue().splitlines() if line.startswith("warning:")]
        found.warnings, found.notes = (list(dict.fromkeys(lines)) for lines in (found.warnings, found.notes))
        found.outcome = self._outcome()
        return found

    def _outcome(self) -> str:
        ends, found = set(self.found.checks.values()), self.found
        if not self.causal and "ok" in ends:
            found.says.insert(0, "its attention is not causal, and that was not refused")
            return "SILENT DIFFERENCE"
        if "DIFFERS" in ends:
            return "SILENT DIFFERENCE"
        if "TRACEBACK" in ends:
            return "TRACEBACK"
        if ends == {"refused"}:
            found.says = [found.says[0].partition(": ")[2]]
            return "refused"
        if "refused" in ends:
            return "partly refused"
        if found.backward in ("", "layerwise"):
            return found.backward or "ok"
        return f"fallback: {found.backward}"

    def log_probabilities(self) -> None:
        """Log-probability of every next token, rows padded together."""
        pairs = zip(self.logp, self.rows, strict=True)
        wanted = torch.cat([following(logp, ids) for logp, ids in pairs])
        got = next_token_logp(load_model(self.student, torch.float32, CPU), self.rows, 2)
        off = self.found.numbers["logp off"] = largest(got - wanted)
        if not off < FLOAT32_LOGP:
            raise Differs(f"float32 log-probabilities are off by up to {off:.3g} nats")

        # In bfloat16 both round: judged by how far transformers' own bfloat16 is from float32 on the same weights.
        rounded, lifted = plain(self.student, torch.bfloat16), plain(self.student, torch.bfloat16).float()
        try:
            half, full = (torch.cat([next_logp(model, ids) for ids in self.rows]) for model in (rounded, lifted))
        except RuntimeError as error:
            self.found.notes.append(f"transformers' own bfloat16 forward fails: {one_line(error)}")
            return
        ours = next_token_logp(load_model(self.student, torch.bfloat16, CPU), self.rows, 2)
        # By the median: where rounding sends a token to another expert, all is different in either.
        typical, allowed = ((one - full).abs().median().item() for one in (ours, half))
        self.found.numbers |= {"bf16 logp off": typical, "bf16 logp off, transformers": allowed}
        if not typical < 1.5 * allowed + 0.02:
            raise Differs(
                f"bfloat16 log-probabilities are off by {typical:.3g} nats in the median, "
                f"transformers' own by {allowed:.3g}"
            )

    def gradients(self) -> None:
        """Loss and gradients of one step of `unlearn`, by the way that its Trainer takes for this model."""
        recipe = load_recipe("neko", {**RECIPE, "dtype": "float32"})
        neko_lean.cache_teacher(
            self.teacher, self.work / "data", self.work / "cache",
            cache=CacheOptions(top_k=self.vocab_size, mass=1.0, dtype="float32", stored_dtype="float32"),
            run=OutputOptions(device="cpu", quiet=True),
        )  # fmt: skip
        lm = load_model(self.student, torch.float32, CPU)
        examples = TrainingExamples(self.forget, self.retain)
        trainer = Trainer(lm, 2, examples, TeacherCache(self.work / "cache"), recipe)
        self.found.backward = trainer.recipe.backward
        trainer.train_mode()
        recorder = Recorder(lm)
        rows = range(len(self.forget)), range(len(self.retain))
        values = trainer.step(recorder, 0.0, rows, trainer.batch(rows))[1]  # type: ignore[arg-type]
        found = recorder.gradients()
        wanted, losses = self._reference_step(recipe.forget_weight, recipe.retain_weight)
        for name, loss in losses.items():
            off = self.found.numbers[f"{name} off"] = abs(values[name] - loss)
            if not off < 1e-3 * (1 + abs(loss)):
                raise Differs(f"{name} is {values[name]:.5g} instead of {loss:.5g}")
        self._compare_gradients(found, wanted)

    def _compare_gradients(self, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
        scale = max(largest(one) for one in wanted.values())
        worst, name = 0.0, ""
        for key, one in wanted.items():
            off = largest(found.get(key, torch.zeros_like(one)) - one) / max(largest(one), 0.01 * scale)
            if not off <= worst:
                worst, name = off, key
        self.found.numbers["gradient off"] = worst
        if not worst < GRADIENT:
            lacking = [key for key, one in wanted.items() if largest(one) > 0 and key not in found]
            more = f"; no gradient at all: {', '.join(lacking[:4])}" if lacking else ""
            raise Differs(f"the gradient of {name} is off by {worst:.3g} of its largest value{more}")

    def _reference_step(self, forget_weight: float, retain_weight: float) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Gradients by name and losses, by plain autograd on full logits."""
        student, teacher = plain(self.student), plain(self.teacher)
        pushed, held = [], []
        for one in self.forget:
            logp = plain_logits(student, torch.tensor([one.input_ids]))[0].log_softmax(1)
            place = torch.arange(one.prompt_length - 1, len(one.input_ids) - 1)
            pushed.append(logp[place, torch.tensor(one.input_ids)[place + 1]])
        for one in self.retain:
            ids = torch.tensor([one.input_ids])
            logp = plain_logits(student, ids)[0].log_softmax(1)
            with torch.no_grad():
                known = plain_logits(teacher, ids)[0].log_softmax(1)
            held.append((known.exp() * (known - logp)).sum(1))
        forget, retain = torch.cat(pushed).mean(), torch.cat(held).mean()
        loss = forget_weight * forget + retain_weight * retain
        loss.backward()
        gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        return gradients, {"loss": loss.item(), "forget_loss": forget.item(), "retain_loss": retain.item()}

    def generations(self) -> None:
        """Token ids of greedy continuations, prompts of different lengths together."""
        rows = [*FORGET[::2], *RETAIN[::2]]
        prompts = [self.tokenizer(row.input)["input_ids"] for row in rows]
        prompts = [ids[:length] for ids, length in zip(prompts, (30, 9, 5, 14, 3, 7), strict=True)]
        stepwise = [self._stepwise(ids) for ids in prompts]
        # A token that the second row says early ends it, so that rows leave their batch at different times.
        end = stepwise[1][3]
        wanted = [cut(ids, {end, 1}) for ids in stepwise]
        other = [cut(self._generate(ids, end), {end, 1}) for ids in prompts]
        if other != wanted:
            self.found.notes.append("transformers' generate says other tokens than its forward over the whole row")
        for dtype in (torch.float32, torch.bfloat16):
            lm = load_model(self.student, dtype, CPU)
            speaker = Speaker(self.tokenizer, end)
            said: dict[int, list[int]] = {}
            for batch in generate(
                lm, speaker, rows, batch_size=6, max_new_tokens=NEW_TOKENS, prompts=prompts, stop_early=False  # type: ignore[arg-type]
            ):  # fmt: skip
                said |= {i: cut([int(token) for token in one.text.split()], {end, 1}) for i, one in batch}
            got = [said[i] for i in range(len(rows))]
            same = sum(one in pair for one, pair in zip(got, zip(wanted, other, strict=True), strict=True))
            key = "generated" if dtype == torch.float32 else "bf16 generated"
            self.found.numbers[key] = same
            if dtype == torch.float32 and same < len(rows):
                worst = next(i for i, one in enumerate(got) if one not in (wanted[i], other[i]))
                raise Differs(
                    f"{len(rows) - same} of {len(rows)} generations differ, "
                    f"one has {got[worst]} instead of {wanted[worst]}"
                    + (f" (transformers' generate: {other[worst]})" if other[worst] != wanted[worst] else "")
                )

    @torch.no_grad()
    def _stepwise(self, prompt: list[int]) -> list[int]:
        """The likeliest token again and again, all anew each time."""
        ids = list(prompt)
        for _ in range(NEW_TOKENS):
            ids.append(int(plain_logits(self.reference, torch.tensor([ids]))[0, -1].argmax()))
        return ids[len(prompt) :]

    @torch.no_grad()
    def _generate(self, prompt: list[int], end: int) -> list[int]:
        """transformers' own greedy generate; empty where it fails."""
        ids = torch.tensor([prompt])
        model = plain(self.student)
        model.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=[end, 1], pad_token_id=2, bos_token_id=0
        )
        try:
            out = model.generate(ids, attention_mask=torch.ones_like(ids))
            return list(map(int, out[0, len(prompt) :]))
        except Exception as error:
            self.found.notes.append(f"transformers' generate fails: {type(error).__name__}: {one_line(error)}")
            return []

    def public_commands(self) -> None:
        """`unlearn`, and what comes out of it once more through transformers, cache_teacher and score."""
        data = self.work / "data"
        for dtype, steps in (("bfloat16", 1), ("float32", 2)):
            out = self.work / f"unlearned-{dtype}"
            with kept_weights() as trained:
                neko_lean.unlearn(
                    self.student,
                    out,
                    data,
                    data,
                    recipe="neko",
                    overrides={**RECIPE, "dtype": dtype, "max_steps": steps},
                    run=RunOptions(device="cpu", quiet=True),
                )
            line = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
            kl = self.found.numbers[f"own KL, {dtype}"] = line["retain_loss"]
            if not abs(kl) < SELF_KL[dtype]:
                raise Differs(f"the KL of a {dtype} student to its own teacher is {kl:.3g} nats at step 1")
        reloaded, loading = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
        wrong = {key: sorted(map(str, value))[:3] for key, value in loading.items() if value}
        if wrong:
            raise Differs(f"the output does not reload: {wrong}")
        stored = load_file(out / "model.safetensors")
        ours = dict(load_model(out, torch.float32, CPU).model.named_parameters())
        for way, parameters in (("transformers", dict(reloaded.named_parameters())), ("neko-lean", ours)):
            other = [name for name, one in trained.items() if not torch.equal(one, parameters[name])]
            if other and all(name in stored and torch.equal(trained[name], stored[name]) for name in other):
                self.found.notes.append(f"transformers changes {other[0]} as it loads it")
            elif other:
                raise Differs(f"{way} reloads other weights than were trained: {other[:3]}")
        before = dict(self.reference.named_parameters())
        moved = sum(not torch.equal(one, before[name]) for name, one in trained.items())
        self.found.numbers["parameters that learned"] = moved / len(trained)
        neko_lean.cache_teacher(
            out,
            data,
            self.work / "cache-2",
            cache=CacheOptions(dtype="float32"),
            run=OutputOptions(device="cpu", quiet=True),
        )
        scores = neko_lean.score(
            out, data, self.work / "scores", settings=ScoreSettings(batch_size=6, max_new_tokens=NEW_TOKENS),
            run=OutputOptions(device="cpu", quiet=True),
        )  # fmt: skip
        if not scores["cells"]:
            raise Differs("no cell was scored")


class Recorder:
    """Takes the place of the optimizer: keeps gradients and changes no weight."""

    updated = False

    def __init__(self, lm: CausalLM) -> None:
        self.lm = lm
        self.names = {id(p): name for name, p in lm.model.named_parameters()}
        self.kept: dict[str, Tensor] = {}

    def begin_step(self, lr: float) -> None:
        pass

    def update(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.kept[self.names[id(parameter)]] = parameter.grad.clone()
            parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """By name; those of a plain backward lie on the parameters."""
        left = {name: p.grad for name, p in self.lm.model.named_parameters() if p.grad is not None}
        return self.kept | left


class Speaker:
    """A tokenizer whose texts are token ids, to see what was generated; `end` is its EOS."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, end: int) -> None:
        self.tokenizer, self.eos_token_id = tokenizer, end

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tokenizer(*args, **kwargs)

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return " ".join(map(str, ids))

    def clean_up_tokenization(self, text: str) -> str:
        return text


@contextlib.contextmanager
def kept_weights() -> Iterator[dict[str, Tensor]]:
    """The parameters that a run writes, as they were in memory then. The run's memory, which takes longer to predict
    than these runs take, is not."""
    kept: dict[str, Tensor] = {}
    write, prediction = loop.save_checkpoint, training_run.predicted_peak

    def watched(lm: CausalLM, *args: Any) -> None:
        kept.update({name: p.detach().clone() for name, p in lm.model.named_parameters()})
        write(lm, *args)

    loop.save_checkpoint, training_run.predicted_peak = watched, lambda *_: None
    try:
        yield kept
    finally:
        loop.save_checkpoint, training_run.predicted_peak = write, prediction


def plain(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """transformers' own model of a folder, evaluation mode."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.config.return_dict = True  # with False no forward of transformers' own runs
    return model


def following(logp: Tensor, ids: Sequence[int]) -> Tensor:
    """Log-probability of every token but the first [L - 1], of log-probabilities [L, V]."""
    return logp[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@torch.no_grad()
def next_logp(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """`following` by a model's own forward."""
    return following(plain_logits(model, torch.tensor([ids]))[0].log_softmax(1), ids)


def cut(ids: Sequence[int], ends: set[int]) -> list[int]:
    """Tokens up to the first that ends a generation."""
    return list(ids[: next((n for n, one in enumerate(ids) if one in ends), len(ids))])


def largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def one_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error))[:300]


def where(error: BaseException) -> str:
    """The last line of ours and the line that raised."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [one for one in frames if "/neko_lean/" in one.filename]
    last = [*ours[-1:], frames[-1]]
    names = [f"{'/'.join(Path(one.filename).parts[-2:])}:{one.lineno}" for one in last]
    return " > ".join(dict.fromkeys(names))


def one_family(name: str, chosen: Sequence[str], out: Path) -> None:
    """Check one family and write what was found, in a process of its own."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    # Output of the libraries other than warnings.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if name in SKIPPED:
        out.write_text(json.dumps(vars(Found("not built", says=[SKIPPED[name]]))))
        return
    start = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="family-"))
    try:
        try:
            bench = Bench(name, work)
        except Exception as error:
            found = Found("not built", says=[f"{type(error).__name__}: {one_line(error)} at {where(error)}"])
        else:
            found = bench.run(chosen)
        found.seconds = time.monotonic() - start
        out.write_text(json.dumps(vars(found)))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def sweep(
    names: Sequence[str], chosen: Sequence[str], jobs: int, timeout: float, path: Path | None
) -> dict[str, Found]:
    """All families, `jobs` at a time; what is found so far is in the JSON file at `path`."""
    fork = multiprocessing.get_context("fork")  # the libraries are imported once
    found: dict[str, Found] = {}
    with tempfile.TemporaryDirectory() as folder:
        waiting = list(enumerate(names))
        running: dict[str, tuple[Any, float, Path]] = {}
        while waiting or running:
            while waiting and len(running) < jobs:
                number, name = waiting.pop(0)
                report = Path(folder) / f"{number}.json"
                process = fork.Process(target=one_family, args=(name, chosen, report))
                process.start()
                running[name] = process, time.monotonic(), report
            time.sleep(0.05)
            for name, (process, start, report) in list(running.items()):
                late = time.monotonic() - start > timeout
                if process.is_alive() and not late:
                    continue
                if process.is_alive():
                    process.kill()
                process.join()
                if report.is_file():
                    found[name] = Found(**json.loads(report.read_text()))
                else:
                    why = f"no end after {timeout:.0f} s" if late else f"died with exit code {process.exitcode}"
                    found[name] = Found("TRACEBACK", says=[why], seconds=time.monotonic() - start)
                del running[name]
                one = found[name]
                done = f"{len(found)}/{len(names)} {name}: {one.outcome} {one.seconds:.1f} s {one.says}"
                print(done, file=sys.stderr, flush=True)
                if path:
                    path.write_text(json.dumps({key: vars(value) for key, value in found.items()}, indent=1) + "\n")
    return {name: found[name] for name in names}


def table(found: dict[str, Found]) -> str:
    lines = ["| family | outcome | logp | gradients | generate | save | why |", "|---|---|---|---|---|---|---|"]
    for name, one in found.items():
        checks = " | ".join(one.checks.get(key, "") for key in CHECKS)
        lines.append(f"| {name} | {one.outcome} | {checks} | {'; '.join(dict.fromkeys(one.says))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="families or variants; by default all")
    parser.add_argument("--checks", nargs="+", metavar="CHECK", choices=CHECKS, default=CHECKS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=120, help="seconds that one family may take")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    every = [*FAMILIES, *VARIANTS]
    unknown = [name for name in options.only or [] if name not in every]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")

    start = time.monotonic()
    found = sweep(options.only or every, options.checks, options.jobs, options.timeout, options.json)
    print(table(found))
    counts: dict[str, int] = {}
    for one in found.values():
        counts[one.outcome] = counts.get(one.outcome, 0) + 1
    print(f"\n{', '.join(f'{count} {outcome}' for outcome, count in sorted(counts.items()))}; "
          f"{time.monotonic() - start:.0f} s, transformers {transformers.__version__}")  # fmt: skip
    sys.exit(any(one.outcome in ("SILENT DIFFERENCE", "TRACEBACK") for one in found.values()))


if __name__ == "__main__":
    main()

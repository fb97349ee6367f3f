"""The checks of bench/families.py on one family, each against plain transformers."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from family_models import FLOAT32_LOGP, FORGET, RETAIN, Differs, Family
from family_tools import (
    IdTokenizer,
    Recorder,
    cut,
    following,
    largest,
    next_logp,
    one_line,
    plain,
    recorded_weights,
)
from safetensors.torch import load_file
from small_models import plain_logits
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

import neko_lean
from neko_lean.cache import CacheOptions, TeacherCache
from neko_lean.models.loading import load_model
from neko_lean.models.predictions import next_token_logp
from neko_lean.options import OutputOptions, RunOptions
from neko_lean.recipe import load_recipe
from neko_lean.scoring import ScoreSettings
from neko_lean.scoring.generation import generate
from neko_lean.training import TrainingExamples
from neko_lean.training.trainer import Trainer

CPU = torch.device("cpu")
GRADIENT = 5e-3  # relative to a parameter's largest gradient, or to a hundredth of the largest of all
SELF_KL = {"float32": 1e-4, "bfloat16": 2e-2}  # nats per position, of a student to its own teacher
NEW_TOKENS = 10
RECIPE = {"format": "plain", "forget_weight": 0.5, "forget_rows": 4, "retain_rows": 4, "eval_every": 0, "lr": 1e-3}


def log_probabilities(family: Family) -> None:
    """Log-probabilities of all next tokens, with rows padded together."""
    pairs = zip(family.logp, family.rows, strict=True)
    expected = torch.cat([following(logp, ids) for logp, ids in pairs])
    actual = next_token_logp(load_model(family.student, torch.float32, CPU), family.rows, 2)
    off = family.result.numbers["logp off"] = largest(actual - expected)
    if not off < FLOAT32_LOGP:
        raise Differs(f"float32 log-probabilities are off by up to {off:.3g} nats")

    # In bfloat16 both round, so the limit is how far transformers' own bfloat16 is from float32 on the same weights.
    rounded, exact = plain(family.student, torch.bfloat16), plain(family.student, torch.bfloat16).float()
    try:
        half, full = (torch.cat([next_logp(model, ids) for ids in family.rows]) for model in (rounded, exact))
    except RuntimeError as error:
        family.result.notes.append(f"transformers' own bfloat16 forward fails: {one_line(error)}")
        return
    ours = next_token_logp(load_model(family.student, torch.bfloat16, CPU), family.rows, 2)
    # By the median, because everything differs in both if rounding sends a token to another expert.
    typical, allowed = ((logp - full).abs().median().item() for logp in (ours, half))
    family.result.numbers |= {"bf16 logp off": typical, "bf16 logp off, transformers": allowed}
    if not typical < 1.5 * allowed + 0.02:
        raise Differs(
            f"bfloat16 log-probabilities are off by {typical:.3g} nats in the median, "
            f"transformers' own by {allowed:.3g}"
        )


def gradients(family: Family) -> None:
    """Loss and gradients of one step of `unlearn`, with the backward pass that its Trainer selects for this model."""
    recipe = load_recipe("neko", {**RECIPE, "dtype": "float32"})
    neko_lean.cache_teacher(
        family.teacher,
        family.work / "cache",
        retain=family.work / "data",
        cache=CacheOptions(top_k=family.vocab_size, mass=1.0, dtype="float32", stored_dtype="float32"),
        run=OutputOptions(device="cpu", quiet=True),
    )
    lm = load_model(family.student, torch.float32, CPU)
    examples = TrainingExamples(family.forget, family.retain)
    trainer = Trainer(lm, 2, examples, TeacherCache(family.work / "cache"), recipe)
    family.result.backward = trainer.recipe.backward
    trainer.train_mode()
    recorder = Recorder(lm)
    rows = range(len(family.forget)), range(len(family.retain))
    values = trainer.step(recorder, 0.0, rows, trainer.batch(rows))[1]  # type: ignore[arg-type]
    actual = recorder.gradients()
    expected, losses = reference_step(family, recipe.forget_weight, recipe.retain_weight)
    for name, loss in losses.items():
        off = family.result.numbers[f"{name} off"] = abs(values[name] - loss)
        if not off < 1e-3 * (1 + abs(loss)):
            raise Differs(f"{name} is {values[name]:.5g} instead of {loss:.5g}")
    compare_gradients(family, actual, expected)


def reference_step(
    family: Family, forget_weight: float, retain_weight: float
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients by name and losses, from plain autograd on full logits."""
    student, teacher = plain(family.student), plain(family.teacher)
    forget_logp, retain_kl = [], []
    for example in family.forget:
        logp = plain_logits(student, torch.tensor([example.input_ids]))[0].log_softmax(1)
        positions = torch.arange(example.prompt_length - 1, len(example.input_ids) - 1)
        forget_logp.append(logp[positions, torch.tensor(example.input_ids)[positions + 1]])
    for example in family.retain:
        ids = torch.tensor([example.input_ids])
        logp = plain_logits(student, ids)[0].log_softmax(1)
        with torch.no_grad():
            teacher_logp = plain_logits(teacher, ids)[0].log_softmax(1)
        retain_kl.append((teacher_logp.exp() * (teacher_logp - logp)).sum(1))
    forget, retain = torch.cat(forget_logp).mean(), torch.cat(retain_kl).mean()
    loss = forget_weight * forget + retain_weight * retain
    loss.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return gradients, {"loss": loss.item(), "forget_loss": forget.item(), "retain_loss": retain.item()}


def compare_gradients(family: Family, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise Differs if a parameter's gradient is off, relative to its largest value."""
    scale = max(largest(gradient) for gradient in expected.values())
    worst, name = 0.0, ""
    for key, gradient in expected.items():
        difference = largest(actual.get(key, torch.zeros_like(gradient)) - gradient)
        off = difference / max(largest(gradient), 0.01 * scale)
        if not off <= worst:
            worst, name = off, key
    family.result.numbers["gradient off"] = worst
    if not worst < GRADIENT:
        missing = [key for key, gradient in expected.items() if largest(gradient) > 0 and key not in actual]
        suffix = f"; no gradient at all: {', '.join(missing[:4])}" if missing else ""
        raise Differs(f"the gradient of {name} is off by {worst:.3g} of its largest value{suffix}")


def generations(family: Family) -> None:
    """Token ids of greedy continuations, with prompts of different lengths in one batch."""
    examples = [*FORGET[::2], *RETAIN[::2]]
    prompts = [family.tokenizer(example.input)["input_ids"] for example in examples]
    prompts = [ids[:length] for ids, length in zip(prompts, (30, 9, 5, 14, 3, 7), strict=True)]
    stepwise = [generate_stepwise(family, ids) for ids in prompts]
    # A token that the second row generates early counts as EOS, so that rows leave the batch at different times.
    end = stepwise[1][3]
    expected = [cut(ids, {end, 1}) for ids in stepwise]
    theirs = [cut(generate_with_transformers(family, ids, end), {end, 1}) for ids in prompts]
    if theirs != expected:
        family.result.notes.append("transformers' generate gives other tokens than its forward over the whole row")
    for dtype in (torch.float32, torch.bfloat16):
        lm = load_model(family.student, dtype, CPU)
        tokenizer = IdTokenizer(family.tokenizer, end)
        generated: dict[int, list[int]] = {}
        for batch in generate(
            lm, tokenizer, examples, batch_size=6, max_new_tokens=NEW_TOKENS, prompts=prompts, stop_early=False  # type: ignore[arg-type]
        ):  # fmt: skip
            for i, generation in batch:
                generated[i] = cut([int(token) for token in generation.text.split()], {end, 1})
        actual = [generated[i] for i in range(len(examples))]
        allowed = list(zip(expected, theirs, strict=True))
        same = sum(ids in pair for ids, pair in zip(actual, allowed, strict=True))
        key = "generated" if dtype == torch.float32 else "bf16 generated"
        family.result.numbers[key] = same
        if dtype == torch.float32 and same < len(examples):
            worst = next(i for i, ids in enumerate(actual) if ids not in allowed[i])
            raise Differs(
                f"{len(examples) - same} of {len(examples)} generations differ, "
                f"one is {actual[worst]} instead of {expected[worst]}"
                + (f" (transformers' generate: {theirs[worst]})" if theirs[worst] != expected[worst] else "")
            )


@torch.no_grad()
def generate_stepwise(family: Family, prompt: list[int]) -> list[int]:
    """Greedy decoding that runs the whole row again for each token."""
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        ids.append(int(plain_logits(family.reference, torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
def generate_with_transformers(family: Family, prompt: list[int], end: int) -> list[int]:
    """transformers' own greedy generate; empty if it fails."""
    ids = torch.tensor([prompt])
    model = plain(family.student)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=[end, 1], pad_token_id=2, bos_token_id=0
    )
    try:
        out = model.generate(ids, attention_mask=torch.ones_like(ids))
        return list(map(int, out[0, len(prompt) :]))
    except Exception as error:
        family.result.notes.append(f"transformers' generate fails: {type(error).__name__}: {one_line(error)}")
        return []


def public_commands(family: Family) -> None:
    """`unlearn`, and its output in transformers, cache_teacher and score."""
    data = family.work / "data"
    for dtype, steps in (("bfloat16", 1), ("float32", 2)):
        out = family.work / f"unlearned-{dtype}"
        with recorded_weights() as trained:
            neko_lean.unlearn(
                family.student,
                out,
                forget=data,
                retain=data,
                recipe="neko",
                overrides={**RECIPE, "dtype": dtype, "max_steps": steps},
                run=RunOptions(device="cpu", quiet=True),
            )
        line = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
        kl = family.result.numbers[f"own KL, {dtype}"] = line["retain_loss"]
        if not abs(kl) < SELF_KL[dtype]:
            raise Differs(f"the KL of a {dtype} student to its own teacher is {kl:.3g} nats at step 1")

    # The output reloads with the weights that were trained.
    reloaded, loading = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    problems = {key: sorted(map(str, value))[:3] for key, value in loading.items() if value}
    if problems:
        raise Differs(f"the output does not reload: {problems}")
    stored = load_file(out / "model.safetensors")
    ours = dict(load_model(out, torch.float32, CPU).model.named_parameters())
    for library, parameters in (("transformers", dict(reloaded.named_parameters())), ("neko-lean", ours)):
        changed = [name for name, weight in trained.items() if not torch.equal(weight, parameters[name])]
        if changed and all(name in stored and torch.equal(trained[name], stored[name]) for name in changed):
            family.result.notes.append(f"transformers changes {changed[0]} when it loads it")
        elif changed:
            raise Differs(f"{library} reloads other weights than were trained: {changed[:3]}")
    before = dict(family.reference.named_parameters())
    moved = sum(not torch.equal(weight, before[name]) for name, weight in trained.items())
    family.result.numbers["parameters that learned"] = moved / len(trained)

    # It can be cached and scored.
    neko_lean.cache_teacher(
        out,
        family.work / "cache-2",
        retain=data,
        cache=CacheOptions(dtype="float32"),
        run=OutputOptions(device="cpu", quiet=True),
    )
    scores = neko_lean.score(
        out,
        family.work / "scores",
        data=data,
        settings=ScoreSettings(batch_size=6, max_new_tokens=NEW_TOKENS),
        run=OutputOptions(device="cpu", quiet=True),
    )
    if not scores["cells"]:
        raise Differs("no cell was scored")


CHECKS: dict[str, Callable[[Family], None]] = {
    "logp": log_probabilities,
    "gradients": gradients,
    "generate": generations,
    "save": public_commands,
}

"""`unlearn` and `memorize` as functions: check the input, load what is needed, train, write the output folder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neko_lean import __version__
from neko_lean.cache import TeacherCache, cache_teacher
from neko_lean.data import Encoded, encode, read_rows, truncation_line
from neko_lean.documents import read_anchor
from neko_lean.errors import NekoLeanError, staged_folder
from neko_lean.levels import with_levels
from neko_lean.memory import resident
from neko_lean.modeling import (
    load_model,
    load_tokenizer,
    model_folder,
    model_name,
    new_model,
    pick_device,
    pick_dtype,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from neko_lean.progress import say
from neko_lean.recipes import DEFAULT, NEED_FORGET_CACHE, Recipe, forgets, load_recipe, needs_teacher
from neko_lean.substitutes import random_answers, refusals
from neko_lean.trainer import Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RUN = "run.json"


def unlearn(
    model: str | Path,
    out: str | Path,
    forget: str | Path,
    retain: str | Path,
    *,
    cache: str | Path | None = None,
    anchor: str | Path | None = None,
    base_cache: str | Path | None = None,
    recipe: str | Path = DEFAULT,
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Push the forget set out of `model`, hold the retain set still, write the result to the folder `out`.

    `unlearn(model_path, output_path, forget_dir, retain_dir)` is the signature by which the shared task ran its
    entries: without a `cache` the teacher is cached first, in a temporary folder, and gone from memory before the
    student is loaded.

    Args:
        model: checkpoint folder or hub name.
        out: folder to write: a complete checkpoint with tokenizer, run.json and metrics.jsonl. Appears when complete.
        forget, retain: parquet, jsonl or csv files, or folders holding `forget.*` and `retain.*`.
        cache: folder that cache_teacher wrote for this model and these retain rows.
        anchor: jsonl file of documents that the model never saw (columns document and, if wanted, task), to hold still
            and to judge by what a forgotten token should cost; cache_teacher takes it too.
        base_cache: folder that cache_teacher wrote, with these forget rows, of the model as it was before it learned
            them, where that is at hand: then its losses are what each forgotten token should cost.
        recipe: name of a shipped recipe, or a .toml file.
        overrides: values of the recipe to replace, by key.
        seed: of the order of rows and of the rounding.
        device: 'cpu', 'cuda', 'cuda:N'; by default the GPU where there is one.

    Returns what run.json holds. Raises NekoLeanError for bad input, and when the loss stops being finite: then `out`
    holds the checkpoint of the best evaluation, if there was one, and nothing otherwise.
    """
    chosen = load_recipe(recipe, overrides)
    folder, place = model_folder(model), pick_device(device)
    tokenizer = load_tokenizer(folder)
    forget_rows = _encode(forget, "forget", tokenizer, chosen) if forgets(chosen) else []
    retain_rows = _encode(retain, "retain", tokenizer, chosen) if chosen.retain_objective != "none" else []
    anchors = encode(read_anchor(anchor), tokenizer, "plain", chosen.max_length) if anchor is not None else []
    substitutes = _substitutes(forget_rows, retain_rows, tokenizer, chosen, seed)
    if chosen.retain_objective != "none":
        retain_rows += anchors
    with staged_folder(Path(out), overwrite) as stage, tempfile.TemporaryDirectory() as scratch:
        reads_cache = needs_teacher(chosen) or (chosen.forget_objective == "calibrated" and bool(anchors))
        if reads_cache and cache is None:
            cache = Path(scratch) / "cache"
            cache_teacher(
                folder,
                retain,
                cache,
                anchor=anchor,
                forget=forget if chosen.forget_objective in NEED_FORGET_CACHE else None,
                format=chosen.format,
                max_length=chosen.max_length,
                batch_tokens=chosen.batch_tokens,
                device=device,
                dtype=chosen.dtype,
                quiet=quiet,
            )
        teacher = None
        if reads_cache and cache is not None:
            teacher = TeacherCache(cache)
            teacher.check(
                weights=weights_fingerprint(folder),
                tokenizer=tokenizer_fingerprint(tokenizer),
                style=chosen.format,
                max_length=chosen.max_length,
                encoded=retain_rows,
            )
        if chosen.forget_objective == "calibrated":
            before_learning = None if base_cache is None else TeacherCache(base_cache)
            forget_rows = _leveled(forget_rows, anchors, teacher, before_learning, tokenizer, chosen)
        for name, encoded in (("forget", forget_rows), ("retain", retain_rows)):
            if encoded:
                say(f"{name}: {truncation_line(encoded, chosen.max_length)}", quiet)
        lost = answers_lost(forget_rows)
        if lost:
            # Even --quiet does not hide that part of the forget set will not be forgotten.
            say(
                f"warning: the length limit of {chosen.max_length} removes the whole answer of {lost} of "
                f"{len(forget_rows)} forget rows; they get no forget loss."
            )
        before = resident()
        student = load_model(folder, pick_dtype(chosen.dtype), place)
        loop = Trainer(student, tokenizer, forget_rows, retain_rows, teacher, chosen, seed, stage, quiet, substitutes)
        run = _train(loop, before, {"command": "unlearn", "model": model_name(model), "forget_answers_lost": lost})
    _raise_failure(run, out)
    return run


def memorize(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    recipe: str | Path = "memorize",
    overrides: Mapping[str, Any] | None = None,
    sets: Sequence[str] = ("forget", "retain"),
    split: str | None = None,
    seed: int = 0,
    device: str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Fine-tune `model` on the rows of `data` with cross-entropy: makes a target model, or a retain-only gold model.

    Args:
        model: checkpoint folder or hub name; a folder with config.json and tokenizer but no weights starts at random.
        data: folder holding `forget.*` and `retain.*` (with `split`: `forget_<split>.*`, ...).
        out: folder to write, as for unlearn.
        sets: which of the two to learn; ('retain',) makes the gold model.

    The rest is as for unlearn.
    """
    chosen = load_recipe(recipe, overrides)
    if chosen.retain_objective != "ce" or chosen.forget_objective != "none":
        raise NekoLeanError(
            f"recipe {chosen.name} is not for memorize: it needs retain_objective ce and no forget one."
        )
    folder, place = model_folder(model), pick_device(device)
    tokenizer = load_tokenizer(folder)
    encoded = [one for name in sets for one in _encode(data, name, tokenizer, chosen, split)]
    say(truncation_line(encoded, chosen.max_length), quiet)
    with staged_folder(Path(out), overwrite) as stage:
        before = resident()
        if any(folder.glob("*.safetensors")):
            student = load_model(folder, pick_dtype(chosen.dtype), place)
        else:
            student = new_model(folder, pick_dtype(chosen.dtype), place, seed)
        loop = Trainer(student, tokenizer, [], encoded, None, chosen, seed, stage, quiet)
        run = _train(loop, before, {"command": "memorize", "model": model_name(model), "sets": list(sets)})
    _raise_failure(run, out)
    return run


def _leveled(
    forget: Sequence[Encoded],
    anchors: Sequence[Encoded],
    teacher: TeacherCache | None,
    base: TeacherCache | None,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
) -> list[Encoded]:
    """The forget rows with what each token should cost, from the best source there is: the model before it learned
    them, unseen documents, or the recipe's level for all."""
    if base is not None:
        made = {"style": recipe.format, "max_length": recipe.max_length, "encoded": []}
        base.check(weights=base.manifest.weights, tokenizer=tokenizer_fingerprint(tokenizer), **made)
        return [replace(one, levels=tuple((-base.target_logp(one)).tolist())) for one in forget]
    if anchors and teacher is not None:
        return with_levels(forget, anchors, [-teacher.target_logp(one) for one in anchors])
    say(
        f"warning: without --anchor or --base-cache nothing says what unseen text costs: every token counts as "
        f"forgotten at {recipe.level} nats."
    )
    return list(forget)


def _substitutes(
    forget: Sequence[Encoded], retain: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, recipe: Recipe, seed: int
) -> list[Encoded] | None:
    """What the recipe puts in the place of each forget row's answer."""
    if recipe.substitute == "none":
        return None
    rows, others = [one.row for one in forget], [one.row for one in retain]
    chosen = refusals(rows) if recipe.substitute == "refusal" else random_answers(rows, others, seed)
    return encode(chosen, tokenizer, recipe.format, recipe.max_length)


def answers_lost(encoded: Sequence[Encoded]) -> int:
    """Rows whose whole answer the length limit removed."""
    return sum(one.answer == 0 for one in encoded)


def _encode(
    path: str | Path, stem: str, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, split: str | None = None
) -> list[Encoded]:
    rows = read_rows(path, stem, split)
    return encode(rows, tokenizer, recipe.format, recipe.max_length, append_eos=recipe.append_eos)


def _train(loop: Trainer, before: int, about: dict[str, Any]) -> dict[str, Any]:
    """Train, and write run.json beside the checkpoint. `before` is the resident set before the model was loaded."""
    run = {**about, **loop.train(), "versions": versions()}
    peaks = run["peak_memory"]
    run["measured_peak"] = peaks.get("allocated", peaks["process"] - before)
    (loop.stage / RUN).write_text(json.dumps(run, indent=1) + "\n")
    return run


def _raise_failure(run: dict[str, Any], out: str | Path) -> None:
    """Only once the output folder is in place: a loss that was no number ends the command, but keeps the checkpoint."""
    if run["failure"]:
        step = run["weights_of_step"]
        raise NekoLeanError(f"{run['failure']}; {out} holds the checkpoint of step {step}: lower lr and run again.")


def versions() -> dict[str, str]:
    """Versions of neko-lean and of the packages that decide a run's numbers."""
    from importlib.metadata import version

    names = ("torch", "transformers", "bitsandbytes", "safetensors", "numpy")
    return {"neko-lean": __version__, **{name: version(name) for name in names}}

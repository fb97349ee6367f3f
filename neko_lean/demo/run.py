"""Build data and model, memorise; then with each recipe cache the teacher, unlearn and score."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from neko_lean.cache import CacheOptions, cache_teacher
from neko_lean.data import Example, read_anchor, read_rows, require_folder
from neko_lean.demo.world import anchor_documents, build_world, task3_documents, write_world
from neko_lean.errors import NekoLeanError
from neko_lean.jsonio import write_jsonl
from neko_lean.models import check_seed, has_bfloat16, pick_device
from neko_lean.options import OutputOptions
from neko_lean.outputs import staged_folder, write_atomically
from neko_lean.recipes import DEFAULT, NEED_FORGET_CACHE, forgets, load_recipe, reads_cache, uses_anchor
from neko_lean.report import report
from neko_lean.runs import memorize, unlearn
from neko_lean.scoring import ScoreInputs, ScoreSettings, score
from neko_lean.terminal import log_line

VOCABULARY = 2048


EOS, PAD = "<|endoftext|>", "<|padding|>"


# Batches by positions rather than rows: the short rows of qa would otherwise take most of the steps.
MEMORIZE: dict[str, Any] = {"retain_rows": 64, "batch_tokens": 768, "epochs": 35.0, "backward": "plain"}


BESIDE = "neko"  # the paper's recipe, to compare with


BESIDE_STEPS = 250  # half of its own: it is here to be looked at, and all of the demo has to stay short


REPORT = "report.html"


ANCHORS = 60  # documents of each task that real rows' anchor has


def demo(
    out: str | Path,
    *,
    data: str | Path | None = None,
    split: str | None = None,
    recipe: str | Path = DEFAULT,
    max_steps: int | None = None,
    seed: int = 0,
    device: str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run the whole job at small scale and write everything under `out`.

    Without `data` the world is made up (see neko_lean.demo.world). With it, real rows: a folder holding `forget.*` and
    `retain.*`, or with `split` `forget_<split>.*`; its `mia/nonmember.jsonl`, where there is one, gives the documents
    that the model never saw, and its `anchor.jsonl`, or else what `retain_train` holds beside these rows, the anchor.
    `recipe` is that of `unlearn`; the paper's runs beside it. `max_steps` cuts both.

    Returns `scores` (of `before` and of each recipe), a `verdict` in words, and where the `files` are.
    """
    check_seed(seed)
    place = pick_device(device)
    recipes = list(dict.fromkeys([str(recipe), BESIDE]))
    given: dict[str, Any] = {} if max_steps is None else {"max_steps": max_steps}
    changes = [
        {"backward": "plain", **({"max_steps": BESIDE_STEPS} if one == BESIDE else {}), **given} for one in recipes
    ]
    chosen = [load_recipe(*one) for one in zip(recipes, changes, strict=True)]
    if not all(map(forgets, chosen)):
        raise NekoLeanError(
            f"recipe {chosen[0].name} forgets nothing: the demo shows what a recipe of unlearn forgets."
        )
    if split is not None and data is None:
        raise NekoLeanError("--split has no effect without --data: the made-up world has no splits; leave it out.")
    if data is not None:
        require_folder(data, "--data", ("forget", "retain"), split)
    start = time.monotonic()
    inputs = [data, recipe if str(recipe).endswith(".toml") else None]
    with staged_folder(out, "demo", inputs, overwrite=overwrite) as stage:
        rows = stage / "data"
        if data is None:
            write_world(build_world(seed), rows)
        else:
            copy_rows(Path(data), split, rows)
        forget, retain = read_rows(rows, "forget"), read_rows(rows, "retain")
        log_line(f"world: {len(forget)} forget rows, {len(retain)} retain rows", quiet)
        common: dict[str, Any] = {"device": device, "quiet": quiet}
        # Emulated bfloat16 would make minutes into an hour.
        dtype: dict[str, Any] = {} if has_bfloat16(place) else {"dtype": "float32"}
        write_base(stage / "base", [*forget, *retain])
        memorize(stage / "base", rows, stage / "target", overrides={**MEMORIZE, **dtype}, seed=seed, **common)
        mia = rows / "mia" if (rows / "mia").is_dir() else None
        measured, settings, output = ScoreInputs(mia=mia), ScoreSettings(batch_size=64), OutputOptions(**common)
        base = score(stage / "target", rows, stage / "scores-before", inputs=measured, settings=settings, run=output)
        scores = {"before": base}
        files, told = ["data", "target", "scores-before"], []
        anchor = rows / "anchor.jsonl" if (rows / "anchor.jsonl").is_file() else None
        for path, change, one in zip(recipes, changes, chosen, strict=True):
            # What the paper's recipe held still is the retain set alone.
            held = anchor if one.name != BESIDE and uses_anchor(one) else None
            asks = reads_cache(one, anchor=held is not None)
            cache, unlearned, result = (f"{kind}-{one.name}" for kind in ("teacher", "unlearned", "scores"))
            if asks:
                cache_teacher(
                    stage / "target", rows, stage / cache, anchor=held,
                    forget=rows if one.forget_objective in NEED_FORGET_CACHE else None,
                    cache=CacheOptions(format=one.format, max_length=one.max_length, **dtype),
                    run=OutputOptions(**common),
                )  # fmt: skip
            run = unlearn(
                stage / "target", stage / unlearned, rows, rows, cache=stage / cache if asks else None, anchor=held,
                recipe=path, overrides={**dtype, **change}, seed=seed, **common,
            )  # fmt: skip
            scores[one.name] = score(
                stage / unlearned, rows, stage / result, settings=settings, run=output,
                inputs=replace(measured, before=stage / "scores-before"),
            )  # fmt: skip
            told.append(verdict(one.name, run, scores["before"], scores[one.name]))
            files += [*([cache] if asks else []), unlearned, result]
        report([stage], stage / REPORT)
        told.append(f"Whole demo: {time.monotonic() - start:.0f} s.")
        found = {
            "scores": scores,
            "verdict": "\n".join(told),
            "files": {name: str(Path(out) / name) for name in [*files, REPORT]},
        }
        write_atomically(stage / "demo.json", json.dumps(found, indent=1) + "\n")
    return found


def copy_rows(source: Path, split: str | None, out: Path) -> None:
    """Copy one split of real rows into `out` as the world would be written, with its Task3 documents as members."""
    sets = {name: read_rows(source, name, split) for name in ("forget", "retain")}
    out.mkdir()
    for name, rows in sets.items():
        write_jsonl(out / f"{name}.jsonl", map(asdict, rows))
    anchors = _anchor(source, {row.input for rows in sets.values() for row in rows})
    if anchors:
        write_jsonl(out / "anchor.jsonl", anchors)
    nonmembers = source / "mia" / "nonmember.jsonl"
    members = task3_documents(sets["forget"])
    if nonmembers.is_file() and members:
        # The official member.jsonl is drawn from the train split: of another split they are non-members.
        (out / "mia").mkdir()
        write_jsonl(out / "mia" / "member.jsonl", members)
        (out / "mia" / "nonmember.jsonl").write_bytes(nonmembers.read_bytes())


def _anchor(source: Path, known: set[str]) -> list[dict[str, str]]:
    """The documents of `anchor.jsonl`, or the first of each task in the train split that are not among these rows."""
    if (source / "anchor.jsonl").is_file():
        return [{"document": row.output, "task": row.task} for row in read_anchor(source / "anchor.jsonl")]
    try:
        rows = [row for row in read_rows(source, "retain", "train") if row.input not in known]
    except NekoLeanError:
        return []
    return anchor_documents(rows, ANCHORS)


def write_base(folder: Path, rows: Sequence[Example], vocabulary: int = VOCABULARY) -> None:
    """Write config and tokenizer of a small OLMo model, no weights; the tokenizer is trained on these rows and has at
    most `vocabulary` tokens."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import OlmoConfig, PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    texts = [f"{row.input} {row.output}" for row in rows]
    trained.train_from_iterator(
        texts, vocab_size=vocabulary, min_frequency=2, special_tokens=[EOS, PAD], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token=EOS, pad_token=PAD)
    tokenizer.save_pretrained(folder)
    OlmoConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        architectures=["OlmoForCausalLM"],
    ).save_pretrained(folder)


def verdict(recipe: str, run: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> str:
    """What the recipe did, in a sentence, from the means of the forget and the retain cells."""

    def mean(scores: dict[str, Any], split: str) -> float:
        values = [v for cell, v in scores["cells"].items() if cell.startswith(split) and v is not None]
        return float(sum(values) / len(values))

    forgot, kept = ([mean(scores, split) for scores in (before, after)] for split in ("forget", "retain"))
    return (
        f"Recipe {recipe}, {run['steps']} steps in {run['wall_seconds']:.0f} s: the mean of the forget cells went from "
        f"{forgot[0]:.3f} to {forgot[1]:.3f}, of the retain cells from {kept[0]:.3f} to {kept[1]:.3f}."
    )

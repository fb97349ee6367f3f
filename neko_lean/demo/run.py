"""Build data and model, memorise, cache the teacher, unlearn, score before and after."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from neko_lean.cache import cache_teacher
from neko_lean.data import Row, read_rows, write_jsonl
from neko_lean.demo.world import build_world, task3_documents, write_world
from neko_lean.errors import staged_folder
from neko_lean.progress import say
from neko_lean.recipes import DEFAULT, load_recipe
from neko_lean.runs import memorize, unlearn
from neko_lean.scoring import score

VOCABULARY = 2048
EOS, PAD = "<|endoftext|>", "<|padding|>"
# Batches by positions rather than rows: the short rows of qa would otherwise take most of the steps.
MEMORIZE: dict[str, Any] = {"retain_rows": 64, "batch_tokens": 768, "epochs": 50.0, "backward": "plain"}


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
    that the model never saw. `recipe` and `max_steps` are those of `unlearn`.

    Returns the two scores (`before`, `after`), a `verdict` in words, and where the `files` are.
    """
    chosen = load_recipe(recipe, {} if max_steps is None else {"max_steps": max_steps})
    start = time.monotonic()
    with staged_folder(Path(out), overwrite) as stage:
        rows = stage / "data"
        if data is None:
            write_world(build_world(seed), rows)
        else:
            copy_rows(Path(data), split, rows)
        forget, retain = read_rows(rows, "forget"), read_rows(rows, "retain")
        say(f"world: {len(forget)} forget rows, {len(retain)} retain rows", quiet)
        common: dict[str, Any] = {"device": device, "quiet": quiet}
        write_base(stage / "base", [*forget, *retain])
        memorize(stage / "base", rows, stage / "target", overrides=MEMORIZE, seed=seed, **common)
        mia = rows / "mia" if (rows / "mia").is_dir() else None
        before = score(stage / "target", rows, stage / "scores-before", mia=mia, batch_size=64, **common)
        cache_teacher(
            stage / "target", rows, stage / "teacher", format=chosen.format, max_length=chosen.max_length, **common
        )
        run = unlearn(
            stage / "target",
            stage / "unlearned",
            rows,
            rows,
            cache=stage / "teacher",
            recipe=recipe,
            overrides={"max_steps": chosen.max_steps},
            seed=seed,
            **common,
        )
        after = score(stage / "unlearned", rows, stage / "scores-after", mia=mia, batch_size=64, **common)
        names = ("data", "target", "teacher", "unlearned", "scores-before", "scores-after")
        result = {
            "before": before,
            "after": after,
            "verdict": verdict(chosen.name, run, before, after, time.monotonic() - start),
            "files": {name: str(Path(out) / name) for name in names},
        }
        (stage / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def copy_rows(source: Path, split: str | None, out: Path) -> None:
    """Copy one split of real rows into `out` as the world would be written, with its Task3 documents as members."""
    sets = {name: read_rows(source, name, split) for name in ("forget", "retain")}
    out.mkdir()
    for name, rows in sets.items():
        write_jsonl(out / f"{name}.jsonl", map(asdict, rows))
    nonmembers = source / "mia" / "nonmember.jsonl"
    members = task3_documents(sets["forget"])
    if nonmembers.is_file() and members:
        # The official member.jsonl is drawn from the train split: of another split they are non-members.
        (out / "mia").mkdir()
        write_jsonl(out / "mia" / "member.jsonl", members)
        (out / "mia" / "nonmember.jsonl").write_bytes(nonmembers.read_bytes())


def write_base(folder: Path, rows: Sequence[Row], vocabulary: int = VOCABULARY) -> None:
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


def verdict(recipe: str, run: dict[str, Any], before: dict[str, Any], after: dict[str, Any], seconds: float) -> str:
    """What the recipe did, in two sentences, from the means of the forget and the retain cells."""

    def mean(scores: dict[str, Any], split: str) -> float:
        values = [v for cell, v in scores["cells"].items() if cell.startswith(split) and v is not None]
        return sum(values) / len(values)

    forgot, kept = ([mean(scores, split) for scores in (before, after)] for split in ("forget", "retain"))
    return (
        f"Recipe {recipe}, {run['steps']} steps: the mean of the forget cells went from {forgot[0]:.3f} to "
        f"{forgot[1]:.3f}, of the retain cells from {kept[0]:.3f} to {kept[1]:.3f}.\n"
        f"Whole demo: {seconds:.0f} s, of which unlearning {run['wall_seconds']:.0f} s."
    )

"""Score one checkpoint: generate, read its views of every document, count, attack, and write what was found."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neko_lean.cache import TeacherCache
from neko_lean.checkpoints import versions
from neko_lean.data import Document, Example, encode_texts, read_documents, read_rows, require_folder
from neko_lean.distributed import run_on_main_and_broadcast, with_process_group
from neko_lean.errors import NekoLeanError
from neko_lean.jsonio import jsonl_text, strict_json
from neko_lean.models import (
    check_seed,
    identify,
    load_model,
    load_tokenizer,
    model_folder,
    model_name,
    peak_memory,
    pick_device,
    pick_dtype,
    quantization_method,
    stated_eos_token_id,
    usable_length,
)
from neko_lean.options import OutputOptions
from neko_lean.outputs import MANIFEST, Output, claim_file, claim_folder, file_sha256, locked, publish_file
from neko_lean.scoring import attacks as attack
from neko_lean.scoring import uncertainty
from neko_lean.scoring.generation import Decoding, refuse_empty_prompts
from neko_lean.scoring.limits import BATCH_TOKENS, MAX_LENGTH, Cut
from neko_lean.scoring.measure import (
    generations,
    held_out_nll,
    line_of,
    membership_attacks,
    reference_losses,
    row_numbers,
)
from neko_lean.scoring.mmlu import mmlu as run_mmlu
from neko_lean.scoring.mmlu_data import read_mmlu
from neko_lean.scoring.official import official_results
from neko_lean.scoring.options import ScoreInputs, ScoreSettings
from neko_lean.scoring.paraphrases import Paraphrase, read_paraphrases
from neko_lean.scoring.score_folder import (
    FINISHED,
    GENERATIONS,
    SCORES,
    finished_score,
    made_from,
    open_score_folder,
    write_result,
    writing,
)
from neko_lean.scoring.stored import read_score
from neko_lean.scoring.task import (
    SPLITS,
    cell_means,
    missing_cells,
    official_blind,
    row_score,
    task_aggregate,
    unicode_score,
)
from neko_lean.scoring.verdict import verdict
from neko_lean.terminal import log_line, progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MIA = "--mia wants a folder with member.jsonl and nonmember.jsonl"


SIDES = ("member", "nonmember")


@with_process_group()
def score(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    inputs: ScoreInputs = ScoreInputs(),
    settings: ScoreSettings = ScoreSettings(),
    run: OutputOptions = OutputOptions(),
) -> dict[str, Any]:
    """Score a checkpoint on forget and retain rows as the shared task does, and ask what its number hides.

    Args:
        model: checkpoint folder, or hub name: owner/name or owner/name@revision.
        data: folder holding `forget.*` and `retain.*` (with a split: `forget_<split>.*`, ...).
        out: folder to write: scores.json, generations.jsonl, documents.jsonl. Appears only when it is complete.
        inputs: further data to measure on.
        settings: how to measure.
        run: device, and what to do with an output that exists.

    Under torchrun the ranks share the rows out and the first one writes; the numbers are those of one process.

    Returns what scores.json holds; docs/score.md says what each key means. Raises NekoLeanError for bad input, and
    for an option that would change nothing.
    """
    mia, split, held, reference = inputs.mia, inputs.split, inputs.held, inputs.reference
    paraphrases, mmlu, before, official = inputs.paraphrases, inputs.mmlu, inputs.before, inputs.official
    shots, lm_eval, attacks, relearn_lr = settings.shots, settings.lm_eval, settings.attacks, settings.relearn_lr
    batch_size, max_new_tokens, seed, dtype = (
        settings.batch_size,
        settings.max_new_tokens,
        settings.seed,
        settings.dtype,
    )
    device, resume, overwrite, quiet = run.device, run.resume, run.overwrite, run.quiet
    if batch_size < 1 or max_new_tokens < 1:
        raise NekoLeanError("batch-size and max-new-tokens must be at least 1.")
    for name in attacks:
        if name not in attack.ATTACKS:
            raise NekoLeanError(f"attack {name!r} is not one of {', '.join(attack.ATTACKS)}.")
    _refuse_unused(attacks, mmlu=mmlu, shots=shots, relearn_lr=relearn_lr, seed=seed)
    if seed is not None:
        check_seed(seed)
    place = pick_device(device)
    require_folder(data, "--data", SPLITS, split)
    rows = [(name, row) for name in SPLITS for row in read_rows(data, name, split)]
    documents = [] if mia is None else [(s, d) for s in SIDES for d in read_documents(Path(mia) / f"{s}.jsonl", MIA)]
    unseen = [] if held is None else read_documents(Path(held), "--held wants a jsonl file with a column document")
    others = [] if paraphrases is None else read_paraphrases(paraphrases, [row for _, row in rows])
    subjects = None if mmlu is None else read_mmlu(Path(mmlu))
    earlier = None if before is None else read_score(before, rows)
    if reference is not None and mia is None:
        raise NekoLeanError("--reference compares the documents of --mia: give both.")
    teacher = None if reference is None else TeacherCache(reference)
    forgotten = {row.id for name, row in rows if name == "forget"}
    if "paraphrase" in attacks and not any(one.input for one in others if one.id in forgotten):
        raise NekoLeanError("--attack paraphrase needs --paraphrases FILE with other inputs of forget rows.")
    if others and "paraphrase" not in attacks and not any(one.output for one in others):
        raise NekoLeanError(
            f"--paraphrases {paraphrases} has no effect: it holds other inputs alone, which are for --attack "
            f"paraphrase; give that too."
        )
    folder = model_folder(model)
    read = [folder, data, mia, held, reference, paraphrases, mmlu, before]
    output = claim_folder(out, "partial", read, overwrite=overwrite, resume=resume)
    results = None if official is None else claim_file(official, "--official", read, overwrite=overwrite or resume)
    if results is not None and results.path.parent == output.path and results.path.name in FINISHED:
        raise NekoLeanError(f"--official {official} is a file that score itself writes there: choose another name.")
    method = quantization_method(folder) if lm_eval else None
    if method is not None:
        raise NekoLeanError(
            f"--lm-eval would run the weights of {folder} quantised ({method}), and all else here runs plain ones: "
            f"give the checkpoint in bfloat16, float16 or float32."
        )
    precision = dtype or ("bfloat16" if place.type == "cuda" else "float32")
    tokenizer = load_tokenizer(folder)
    known = None
    if teacher is not None and mia is not None:
        known = reference_losses(teacher, mia, documents, rows, tokenizer, usable_length(folder, MAX_LENGTH))
    _refuse_too_short(
        tokenizer, [row for _, row in rows], others, {"--mia": [d for _, d in documents], "--held": unseen}
    )
    blind = {s: official_blind([row for name, row in rows if name == s], tokenizer.clean_up_tokenization)
             for s in SPLITS}  # fmt: skip
    _warn_blind(blind, rows)
    start = time.monotonic()
    identity = identify(folder, tokenizer)
    plan = {
        "model": identity.weights,
        "tokenizer": identity.tokenizer,
        "config": identity.config,
        "rows": [f"{name} {row.digest}" for name, row in rows],
        "max_new_tokens": max_new_tokens,
        "dtype": precision,
        "eos_token_id": stated_eos_token_id(folder),
    }
    options = {
        "mia": digest(documents),
        "held": digest(unseen),
        "paraphrases": digest(others),
        "mmlu": digest(subjects),
        "reference": None if reference is None else file_sha256(Path(reference) / MANIFEST),
        "before": None if earlier is None else digest(earlier),
        "shots": shots,
        "lm_eval": list(lm_eval),
        "attacks": sorted(attacks),
        "relearn_lr": relearn_lr,
        "seed": seed,
        "device": place.type,
    }
    made = made_from(plan, options)
    done = finished_score(output, made, plan) if resume else None
    if done is not None:
        read_score(output.path, rows)
        log_line(f"{output.path} is complete: nothing to do.", quiet)
        if results is not None:
            _write_official(results, done, run_on_main_and_broadcast(lambda: _finished_lines(output, made, rows)), rows)
        return done
    with open_score_folder(output, plan, resume=resume, quiet=quiet) as stage:
        lm = load_model(folder, pick_dtype(precision), place)
        cut, decoding = Cut(), Decoding(batch_size, max_new_tokens)
        said = generations(lm, tokenizer, [row for _, row in rows], stage, decoding, cut, quiet)
        numbers = row_numbers(lm, tokenizer, [row for _, row in rows], said, others, cut, quiet)
        lines = [line_of(name, row, one, more) for (name, row), one, more in zip(rows, said, numbers, strict=True)]
        scored = {name: [(row, row_score(row, one.text)) for (s, row), one in zip(rows, said, strict=True) if s == name]
                  for name in SPLITS}  # fmt: skip
        cells = cell_means(scored)
        unicode = {name: [(row, unicode_score(row, one.text)) for (s, row), one in zip(rows, said, strict=True)
                          if s == name] for name in SPLITS}  # fmt: skip
        members = membership_attacks(lm, tokenizer, documents, known, stage, cut, quiet)
        found = uncertainty.estimates(lines)
        scores: dict[str, Any] = {
            "model": model_name(model),
            "cells": cells,
            "unicode_cells": cell_means(unicode),
            "official_blind": blind,
            "missing_cells": missing_cells(cells),
            "task_aggregate": task_aggregate(cells),
            "membership": members,
            "mmlu": None,
            "final": None,
            **group_means(found),
            "held_nll": held_out_nll(lm, tokenizer, unseen, cut, quiet) if unseen else None,
            "nonmember_nll": None if members is None else members["nonmember_loss"],
            "uniform_nll": math.log(len(lm.head)),
            "intervals": uncertainty.intervals(found),
            "attacks": {},
            "lm_eval": None,
        }
        if subjects is not None:
            with progress_bar("MMLU", sum(len(one.test) for one in subjects.values()), "questions", quiet) as progress:
                scores["mmlu"] = run_mmlu(
                    lm,
                    tokenizer,
                    subjects,
                    shots=5 if shots is None else shots,
                    batch_tokens=BATCH_TOKENS,
                    progress=progress,
                )
        if members is not None and scores["mmlu"] is not None and scores["task_aggregate"] is not None:
            parts = scores["task_aggregate"], members["score"], scores["mmlu"]["micro"]
            scores["final"] = sum(parts) / len(parts)
        scores["difference"] = None if earlier is None else _difference(scores, lines, earlier)
        say_rows = attack.talker(tokenizer, decoding, cut, quiet)
        forget = [row for name, row in rows if name == "forget"]
        base = {row.id: one for (name, row), one in zip(rows, said, strict=True) if name == "forget"}
        if "prefix" in attacks:
            scores["attacks"]["prefix"] = attack.prefix(lm, tokenizer, forget, base, say_rows)
        if "paraphrase" in attacks:
            scores["attacks"]["paraphrase"] = attack.paraphrase(lm, forget, base, others, say_rows)
        del lm  # what follows loads models of its own, one at a time
        if "quantize" in attacks:
            scores["attacks"]["quantize"] = attack.quantize(
                lambda: load_model(folder, pick_dtype(precision), place), forget, base, say_rows
            )
        if "relearn" in attacks:
            scores["attacks"]["relearn"] = attack.relearn(
                folder, lambda at: load_model(at, pick_dtype(precision), place), forget, base, say_rows, stage,
                lr=1e-4 if relearn_lr is None else relearn_lr, seed=seed or 0, device=device,
            )  # fmt: skip
        if lm_eval:
            from neko_lean.scoring.lm_eval import lm_eval_tasks

            scores["lm_eval"] = run_on_main_and_broadcast(
                lambda: lm_eval_tasks(folder, lm_eval, str(place), precision, batch_size)
            )
        scores["verdict"] = verdict(scores)
        scores["broken"] = any(sentence.startswith("BROKEN") for sentence in scores["verdict"])
        scores |= {
            "rows": {name: len(scored[name]) for name in SPLITS},
            "dtype": precision,
            "device": str(place),
            "max_new_tokens": max_new_tokens,
            "cut": asdict(cut),
            "versions": versions(),
            "made_from": made,
            "wall_seconds": time.monotonic() - start,
            "peak_memory": peak_memory(place),
        }

        def write() -> None:
            strict_json(lines, GENERATIONS)
            write_result(stage, strict_json(scores, SCORES, indent=1) + "\n", jsonl_text(lines))

        run_on_main_and_broadcast(writing(stage, write))
    if results is not None:
        _write_official(results, scores, lines, rows)
    return scores


def digest(value: object) -> str:
    """SHA-256 over what was read from a file: rows, documents, questions or scores."""
    return hashlib.sha256(repr(value).encode("utf-8", "surrogatepass")).hexdigest()


def _finished_lines(output: Output, made: str, rows: Sequence[tuple[str, Example]]) -> list[dict[str, Any]]:
    """The rows of a finished score, read while no other run may replace them."""
    with locked(output):
        found = read_score(output.path, rows)
    if found.get("made_from") != made:
        raise NekoLeanError(f"{output.path} was replaced by another run meanwhile: run again.")
    lines: list[dict[str, Any]] = found["lines"]
    return lines


def _write_official(
    file: Output, scores: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], rows: Sequence[tuple[str, Example]]
) -> None:
    """Write the shared task's own results of a finished score from its rows."""
    points = {(line["split"], line["id"]): line["score"] for line in lines}
    scored = {name: [(row, points[name, row.id]) for split, row in rows if split == name] for name in SPLITS}
    results = official_results(scores, scored)
    text = strict_json(results, str(file.path), indent=4) + "\n"
    run_on_main_and_broadcast(lambda: publish_file(text, file, "--official"))


def _refuse_unused(attacks: Sequence[str], mmlu: str | Path | None, **options: float | None) -> None:
    """Raise NekoLeanError for an option whose attack or benchmark was not asked for."""
    for name, wanted, asked in (
        ("shots", "--mmlu", mmlu is not None),
        ("relearn_lr", "--attack relearn", "relearn" in attacks),
        ("seed", "--attack relearn", "relearn" in attacks),
    ):
        if options[name] is not None and not asked:
            raise NekoLeanError(f"--{name.replace('_', '-')} has no effect without {wanted}: give both or neither.")


def _refuse_too_short(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    others: Sequence[Paraphrase],
    documents: Mapping[str, Sequence[Document]],
) -> None:
    """Raise NekoLeanError for a prompt of no tokens and for a document of fewer than two, before any work is done."""
    known = {row.id: row for row in rows}
    asked = [replace(known[one.id], input=one.input) for one in others if one.input is not None]
    for some in (rows, asked):
        refuse_empty_prompts(some, encode_texts(tokenizer, [row.input for row in some]))
    for option, found in documents.items():
        for number, ids in enumerate(encode_texts(tokenizer, [one.text for one in found]), start=1):
            if len(ids) < 2:
                raise NekoLeanError(
                    f"{option}: document {number} has fewer than two tokens, so it has no loss: remove it."
                )


def _warn_blind(blind: Mapping[str, Mapping[str, int]], rows: Sequence[tuple[str, Example]]) -> None:
    """Say, even if --quiet, how many rows the official numbers cannot judge."""
    for split in SPLITS:
        total = sum(name == split for name, _ in rows)
        few, unseen = blind[split]["unscorable"], blind[split]["mostly_unseen"]
        parts = [f"{few} of {total} {split} rows score below 1 for their own true answer"] if few else []
        parts += [f"of {unseen} of {total} {split} rows it sees less than half of the words"] if unseen else []
        if parts:
            log_line(
                f"warning: the task's official arithmetic knows English letters alone and moves spaces: "
                f"{'; '.join(parts)}. Its cells do not measure these rows; unicode_cells do, and the "
                f"verdict reads those."
            )


def group_means(found: Mapping[str, tuple[float | None, Any]]) -> dict[str, Any]:
    """memorisation, leaks and outputs of both splits, None where no row has the number."""
    groups: dict[str, Any] = {}
    for name, (group, _) in uncertainty.KEYS.items():
        for split in SPLITS:
            value = found.get(f"{group}.{split}.{name}", (None,))[0]
            groups.setdefault(group, {}).setdefault(split, {})[name] = value
    return groups


def _difference(
    scores: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], before: dict[str, Any]
) -> dict[str, Any]:
    """What changed since an earlier score of the same rows."""
    found: dict[str, Any] = {"before": before["model"], **uncertainty.differences(lines, before["lines"])}
    for name in ("held_nll", "nonmember_nll"):
        if scores[name] is not None and before.get(name) is not None:
            found.setdefault("unseen_nll", {"difference": scores[name] - before[name], "interval": None})
    return found

"""`memorize` as a function: fine-tune a model on its data, to make a target or a gold model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from neko_lean.checkpoints import check_run_folder, rows_digest
from neko_lean.data import (
    describe_rows,
    encode,
    find_format,
    position_warning,
    read_rows,
    require_folder,
    truncation_summary,
)
from neko_lean.distributed import with_process_group
from neko_lean.errors import NekoLeanError
from neko_lean.models import (
    check_seed,
    holds_weights,
    load_model,
    load_tokenizer,
    model_config,
    model_name,
    new_model,
    pick_device,
    pick_dtype,
    read_config,
    tokenizer_fingerprint,
    usable_length,
    weights_fingerprint,
)
from neko_lean.options import RunOptions
from neko_lean.recipe import forgets, load_recipe
from neko_lean.runs.dry_run import plan_training
from neko_lean.runs.training_run import (
    TrainingJob,
    check_extras,
    claim_before_download,
    finished_before,
    identity_of,
    raise_failure,
    recipe_file,
    train,
    work_folder,
)
from neko_lean.terminal import log_line
from neko_lean.training import TrainingExamples


@with_process_group()
def memorize(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    recipe: str | Path = "memorize",
    overrides: Mapping[str, Any] | None = None,
    sets: Sequence[str] = ("forget", "retain"),
    split: str | None = None,
    run: RunOptions = RunOptions(),
) -> dict[str, Any]:
    """Fine-tune a model with cross-entropy: makes a target model, or a gold model that never saw the forget set.

    Args:
        model: checkpoint folder or hub name, as for `unlearn`. A folder with config.json and tokenizer but without
            weights starts from random weights, which follow from the seed.
        data: folder that holds `forget.*` and `retain.*` (with `split`: `forget_<split>.*`, ...).
        out: folder to write, as for `unlearn`.
        recipe: name of a shipped recipe, or path of a .toml file: cross-entropy on the retain set alone.
        overrides: values of the recipe to replace, by key.
        sets: which sets to learn; ('retain',) makes the gold model.
        split: part of the files' names, as LUME has them.
        run: columns of the data, device, seed, saving, and how to treat an existing output.

    Returns:
        The contents of run.json; of a dry run, what `plan_training` returns.

    Raises:
        NekoLeanError, Interrupted: as for `unlearn`.
    """
    # Check everything that can be checked without the model.
    check_seed(run.seed)
    chosen = load_recipe(recipe, overrides)
    if chosen.retain_objective != "ce" or forgets(chosen):
        raise NekoLeanError(
            f"recipe {chosen.name} does not work with memorize, which needs retain_objective ce and neither a "
            f"forget_objective nor a substitute; use recipe memorize."
        )
    require_folder(data, "--data", sets, split)
    check_extras(chosen)
    device = pick_device(run.device)
    output, folder = claim_before_download(out, model, [data, recipe_file(recipe)], run)

    # Examples.
    tokenizer = load_tokenizer(folder)
    max_length = usable_length(folder, chosen.max_length)
    rows = {name: read_rows(data, name, split, columns=run.columns) for name in sets}
    prompts = find_format(chosen.format, tokenizer, chosen.system)
    all_rows = list(chain.from_iterable(rows.values()))
    examples = encode(all_rows, tokenizer, prompts, max_length, append_eos=chosen.append_eos, windows=True)
    for name in sets:
        log_line(describe_rows(rows[name], name), run.quiet)
    if summary := truncation_summary(examples, max_length):
        log_line(summary, run.quiet)
    if warning := position_warning(examples, max_length, chosen.max_length):
        log_line(warning)

    # The model: its weights, or random ones that follow from config.json and the seed.
    is_trained = holds_weights(folder)
    dtype = pick_dtype(chosen.dtype)
    if is_trained:
        make_student = partial(load_model, folder, dtype)
    else:
        make_student = partial(new_model, folder, dtype, seed=run.seed)
        log_line(f"{folder} holds no weights: starting from random ones, made from --seed {run.seed}.", run.quiet)
    parts = {
        "model": weights_fingerprint(folder) if is_trained else "random weights",
        "tokenizer": tokenizer_fingerprint(tokenizer),
        # Random weights depend on all of config.json, for example on its initializer_range.
        "config": model_config(folder, training=chosen.dropout) if is_trained else read_config(folder),
        "rows": rows_digest(examples),
    }
    identity = identity_of("memorize", chosen, run.seed, device, parts)
    if (result := finished_before(output, identity, run)) is not None:
        return result

    if run.dry_run:
        check_run_folder(output, identity, resume=run.resume)
        return plan_training(folder, output, TrainingExamples(retain=examples), chosen, device, run.seed)

    with work_folder(output, identity, run) as (work, signals):
        job = TrainingJob(make_student, tokenizer, TrainingExamples(retain=examples), None, chosen, device, run)
        about = {"command": "memorize", "model": model_name(model), "random_start": not is_trained}
        result = train(job, work, signals, {**about, "sets": list(sets)})
    raise_failure(result, output.path)
    return result

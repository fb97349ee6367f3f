"""`memorize` as a function: fine-tune a model on its data, to make a target or a gold model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neko_lean.checkpoints import check_run_folder, rows_digest
from neko_lean.data import (
    Rows,
    RowSource,
    describe_rows,
    encode,
    find_format,
    holds_only_texts,
    log_truncation,
    paths_among,
    read_rows,
    refuse_unused_split,
)
from neko_lean.distributed import with_process_group
from neko_lean.errors import NekoLeanError
from neko_lean.models import (
    Model,
    accepts_loaded_model,
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
from neko_lean.options import TrainingOptions
from neko_lean.recipe import forgets, load_recipe
from neko_lean.runs.dry_run import plan_training
from neko_lean.runs.trackers import check_tracker
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
from neko_lean.training import Callback, TrainingExamples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALL_SETS = ("forget", "retain")


@with_process_group()
@accepts_loaded_model
def memorize(
    model: Model,
    out: str | Path,
    *,
    data: RowSource,
    tokenizer: PreTrainedTokenizerBase | None = None,
    recipe: str | Path = "memorize",
    overrides: Mapping[str, Any] | None = None,
    sets: Sequence[str] = ALL_SETS,
    callback: Callback | None = None,
    run: TrainingOptions = TrainingOptions(),
) -> dict[str, Any]:
    """Fine-tune a model with cross-entropy: makes a target model, or a gold model that never saw the forget set.

    Args:
        model: checkpoint folder, hub name or loaded model, as for `unlearn`. A folder with config.json and tokenizer
            but without weights starts from random weights, which follow from the seed.
        out: folder to write, as for `unlearn`.
        data: folder that holds `forget.*` and `retain.*` (with `run.split`: `forget_<split>.*`, ...); or one data set
            as for `read_rows`, all of which is learned.
        tokenizer: the tokenizer of a loaded model.
        recipe: name of a shipped recipe, or path of a .toml file: cross-entropy on the retain set alone.
        overrides: values of the recipe to replace, by key.
        sets: which sets of a folder to learn; ('retain',) makes the gold model.
        callback: called after each step, as for `unlearn`.
        run: split and columns of the data, device, seed, saving, and how to treat an existing output.

    Returns:
        The contents of run.json; of a dry run, what `plan_training` returns.

    Raises:
        NekoLeanError, Interrupted: as for `unlearn`.

    Example::

        neko_lean.memorize("allenai/OLMo-1B-0724-hf", "gold/", data="data/", sets=("retain",))
    """
    # Check everything that can be checked without the model.
    sets = (sets,) if isinstance(sets, str) else tuple(sets)
    check_seed(run.seed)
    check_tracker(run.log_to)
    chosen = load_recipe(recipe, overrides)
    if chosen.retain_objective != "ce" or forgets(chosen):
        raise NekoLeanError(
            f"recipe {chosen.name} does not work with memorize, which needs retain_objective ce and neither a "
            f"forget_objective nor a substitute; use recipe memorize."
        )
    check_extras(chosen, run, data)
    device = pick_device(run.device)
    output, folder = claim_before_download(out, model, [*paths_among(data), recipe_file(recipe)], run)

    # Examples.
    tokenizer = load_tokenizer(folder)
    max_length = usable_length(folder, chosen.max_length)
    rows = _read_sets(data, sets, run)
    prompts = find_format(chosen.format, tokenizer, chosen.system)
    all_rows = list(chain.from_iterable(rows.values()))
    examples = encode(all_rows, tokenizer, prompts, max_length, append_eos=chosen.append_eos, windows=True)
    for name in rows:
        log_line(describe_rows(rows[name], name), run.quiet)
    log_truncation(examples, max_length, chosen.max_length, run.quiet)

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
        job = TrainingJob(
            make_student, tokenizer, TrainingExamples(retain=examples), None, chosen, device, run, str(model), callback
        )
        about = {"command": "memorize", "model": model_name(model), "random_start": not is_trained}
        result = train(job, work, signals, {**about, "sets": list(rows)})
    raise_failure(result, output.path)
    return result


def _read_sets(data: RowSource, sets: Sequence[str], run: TrainingOptions) -> dict[str, Rows]:
    """The rows to learn by set; a data set that is not a folder with sets is one set, "data"."""
    if isinstance(data, (str, Path)) and Path(data).is_dir() and not holds_only_texts(Path(data)):
        return {name: read_rows(data, name, run.split, columns=run.columns) for name in sets}
    refuse_unused_split(run.split, data)
    if sets != ALL_SETS:
        raise NekoLeanError(
            f"only the {' and '.join(sets)} set is to be learned, so the data must be a folder with {sets[0]}.*; name "
            f"that folder, or learn all rows of the data."
        )
    return {"data": read_rows(data, columns=run.columns)}

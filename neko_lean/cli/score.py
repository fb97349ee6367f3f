"""`neko-lean score`: did it forget, keep, or break?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neko_lean.cli.common import Device, Json, Model, Overwrite, Quiet, Revision, Split, command, emit, pinned
from neko_lean.distributed import is_main_process
from neko_lean.terminal import print_table


@command
def score(
    model: Model,
    data: Annotated[Path, typer.Option(help="Folder holding forget.* and retain.*.")],
    out: Annotated[Path, typer.Option(help="Folder to write: scores.json, generations.jsonl, documents.jsonl.")],
    mia: Annotated[Path | None, typer.Option(help="Folder holding member.jsonl and nonmember.jsonl.")] = None,
    split: Split = None,
    held: Annotated[
        Path | None, typer.Option(help="jsonl file of documents nobody trained on: what tells a broken model.")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="Teacher cache with the losses of the --mia documents, for the reference attack."),
    ] = None,
    paraphrases: Annotated[
        Path | None,
        typer.Option(help="jsonl file: id and another input, or another output and a list of wrong ones; or all."),
    ] = None,
    mmlu: Annotated[Path | None, typer.Option(help="Folder with MMLU, as the hub has it or as its authors do.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="MMLU examples before each question.  [default: 5]")] = None,
    lm_eval: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="Task of lm-evaluation-harness (neko-lean[lm-eval]); repeatable."),
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(help="relearn, quantize, paraphrase or prefix: what does it bring back? Repeatable."),
    ] = None,
    relearn_lr: Annotated[
        float | None, typer.Option(help="Learning rate of --attack relearn.  [default: 1e-4]")
    ] = None,
    before: Annotated[
        Path | None, typer.Option(help="Score folder of the model before: differences with intervals.")
    ] = None,
    official: Annotated[Path | None, typer.Option(help="Also write the shared task's own results file.")] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts generated together.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of a generation.")] = 256,
    seed: Annotated[int | None, typer.Option(help="Of the rows that --attack relearn trains on.  [default: 0]")] = None,
    revision: Revision = None,
    device: Device = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16.  [default: float32 on a CPU, bfloat16 on a GPU]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a score that was cut off.")] = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score a model with the shared task's own arithmetic, and say what that number hides. What was not measured is
    called so.

    Example: neko-lean score unlearned/ --data data/ --mia data/mia --before scores-before/ --out scores/

    Was it forgotten or hidden? neko-lean score unlearned/ --data data/ --attack relearn --attack quantize --out scores/
    """
    from neko_lean.options import OutputOptions
    from neko_lean.scoring import ScoreInputs, ScoreSettings, score_table
    from neko_lean.scoring import score as run

    inputs = ScoreInputs(
        mia=mia,
        split=split,
        held=held,
        reference=reference,
        paraphrases=paraphrases,
        mmlu=mmlu,
        before=before,
        official=official,
    )
    settings = ScoreSettings(
        shots=shots,
        lm_eval=tuple(lm_eval or ()),
        attacks=tuple(attack or ()),
        relearn_lr=relearn_lr,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        seed=seed,
        dtype=dtype,
    )
    output = OutputOptions(device=device, resume=resume, overwrite=overwrite, quiet=quiet)
    result = run(pinned(model, revision), data, out, inputs=inputs, settings=settings, run=output)
    if not is_main_process():
        return
    if json:
        emit({"out": str(out), **result})
    elif not quiet:
        print_table(score_table({"score": result}))

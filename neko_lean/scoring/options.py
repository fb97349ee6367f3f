"""What `score` measures a model on, and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from neko_lean.options import option


@dataclass(frozen=True, kw_only=True)
class ScoreInputs:
    """Files and folders that a score reads or writes beyond the forget and retain sets. What is not given is not
    measured."""

    mia: str | Path | None = option(
        None, "Folder with member.jsonl and nonmember.jsonl, for the membership inference attacks."
    )
    split: str | None = option(None, "Read forget_SPLIT.* and retain_SPLIT.*, as LUME names its files.")
    held: str | Path | None = option(
        None, "Documents that no model was trained on (jsonl), to recognize a broken model by its loss."
    )
    reference: str | Path | None = option(
        None, "Teacher cache of a reference model with the losses of the --mia documents, for the reference attack."
    )
    paraphrases: str | Path | None = option(
        None, "Paraphrases (jsonl): id and another input, another output and a list of wrong ones, or all of these."
    )
    mmlu: str | Path | None = option(None, "Folder with MMLU, in the layout of the hub or of its authors.")
    before: str | Path | None = option(
        None, "Score folder of the model before unlearning: adds differences with confidence intervals."
    )
    official: str | Path | None = option(None, "File for the shared task's own results format.")


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """How a model is scored."""

    shots: int | None = option(None, "MMLU examples before each question.  [default: 5]", min=0)
    lm_eval: tuple[str, ...] = option(
        (), "Task of lm-evaluation-harness (neko-lean[lm-eval]); repeatable.", metavar="TASK"
    )
    attacks: tuple[str, ...] = option(
        (),
        "Try to bring back what was forgotten: relearn, quantize, paraphrase or prefix; repeatable.",
        flag="--attack",
    )
    relearn_lr: float | None = option(None, "Learning rate of --attack relearn.  [default: 1e-4]")
    batch_size: int = option(32, "Prompts generated together.")
    max_new_tokens: int = option(256, "Most tokens of a generation; the shared task uses 256.")
    seed: int | None = option(None, "Random seed for the rows that --attack relearn trains on.  [default: 0]")
    dtype: str | None = option(None, "float32 or bfloat16.  [default: float32 on a CPU, bfloat16 on a GPU]")

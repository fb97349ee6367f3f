"""The options of `score`: further inputs, and how the model is measured.

Each field is also a command-line option; its help text is what `neko-lean score --help` prints.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from neko_lean.options import option


@dataclass(frozen=True, kw_only=True)
class ScoreInputs:
    """Optional inputs and outputs of `score`. A measurement whose input is missing is reported as not measured."""

    mia: str | Path | None = option(None, "Folder with member.jsonl and nonmember.jsonl, for membership inference.")
    split: str | None = option(None, "Read forget_SPLIT.* and retain_SPLIT.*, as LUME names its files.")
    held: str | Path | None = option(
        None, "JSONL file of documents that no model was trained on; used to detect a broken model."
    )
    reference: str | Path | None = option(
        None, "Teacher cache with a reference model's losses of the --mia documents, for the reference attack."
    )
    paraphrases: str | Path | None = option(
        None, "JSONL file of paraphrases: id, and input, or output with a list of wrong answers, or all three."
    )
    mmlu: str | Path | None = option(None, "Folder with MMLU, in the layout of the hub or of its authors.")
    before: str | Path | None = option(
        None, "Score folder of the model before unlearning; adds differences with confidence intervals."
    )
    official: str | Path | None = option(None, "Also write the results file of the shared task to this path.")


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """How `score` measures a model."""

    shots: int | None = option(None, "Number of MMLU examples before each question.  [default: 5]", min=0)
    lm_eval: tuple[str, ...] = option(
        (), "Task of lm-evaluation-harness (needs neko-lean[lm-eval]); repeatable.", metavar="TASK"
    )
    attacks: tuple[str, ...] = option(
        (),
        "Attack that tries to recover the forget set: prefix, paraphrase, quantize or relearn; repeatable.",
        flag="--attack",
    )
    relearn_lr: float | None = option(None, "Learning rate of --attack relearn.  [default: 1e-4]")
    batch_size: int = option(32, "Maximum number of prompts generated together.")
    max_new_tokens: int = option(256, "Maximum number of tokens per generation; the shared task uses 256.")
    seed: int | None = option(None, "Random seed for the examples that --attack relearn trains on.  [default: 0]")
    dtype: str | None = option(None, "float32 or bfloat16.  [default: float32 on a CPU, bfloat16 on a GPU]")

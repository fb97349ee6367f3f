"""The options of all commands: one dataclass field each, with the help text that `--help` prints.

The Python API takes these dataclasses; `cli/flags.py` turns their fields into command-line options. So an option
is named, typed, defaulted and explained in one place, and the command line need not import the packages that use it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The recipe that `unlearn` uses by default.
DEFAULT_RECIPE = "calibrated"

# The groups in which `--help` lists options, in this order.
DATA = "Data"
TEACHER = "Teacher"
RECIPE = "Recipe"
MEASUREMENTS = "Measurements"
COMPARISONS = "Comparisons"
GENERATION = "Generation"
MEMORY = "Memory and device"
OUTPUT = "Output"
MESSAGES = "Messages and help"
OTHER = "Options"
PANELS = (DATA, TEACHER, RECIPE, MEASUREMENTS, COMPARISONS, GENERATION, MEMORY, OUTPUT, OTHER, MESSAGES)


def option(default: Any, help: str, panel: str = OTHER, **typer: Any) -> Any:
    """A dataclass field that is also a command-line option.

    Args:
        default: the field's default value.
        help: one plain sentence for `--help`.
        panel: the group of PANELS that `--help` lists it in.
        typer: further arguments of `typer.Option`, such as `min` or `metavar`, and `flags`: the option's names on the
            command line, where they differ from the field's.
    """
    return field(default=default, metadata={"help": help, "rich_help_panel": panel, **typer})


COLUMNS_HELP = "Columns of the data, if their names are not recognised: prompt=q,answer=a,group=topic."
SPLIT_HELP = "In a folder, read forget_SPLIT.* and retain_SPLIT.*, or a split of TOFU, such as forget10."
OVERLAP_HELP = "Leave out rows that are also in another set, instead of refusing them."


@dataclass(frozen=True, kw_only=True)
class BasicOptions:
    """Where a command runs, what it prints, and whether it replaces its output."""

    device: str | None = option(None, "cpu, cuda or cuda:N.  [default: the GPU if there is one]", MEMORY)
    overwrite: bool = option(
        False, "Replace an output that neko-lean wrote, or an unfinished run; never anything else.", OUTPUT
    )
    quiet: bool = option(False, "Print no progress and no tables.", MESSAGES)


@dataclass(frozen=True, kw_only=True)
class OutputOptions(BasicOptions):
    """Options of a command that can be resumed."""

    resume: bool = option(False, "Continue an interrupted run of the same command; it ends in the same result.", OUTPUT)
    dry_run: bool = option(False, "Read and check everything, print what the run would do, and write nothing.", OUTPUT)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(OutputOptions):
    """Options of a training run."""

    split: str | None = option(None, SPLIT_HELP, DATA)
    columns: str | None = option(None, COLUMNS_HELP, DATA, metavar="KEY=COLUMN,...")
    seed: int = option(0, "Random seed for data order and stochastic rounding.", RECIPE)
    log_to: str | None = option(
        None, "Also send the metrics of each step to trackio, wandb or tensorboard.", OUTPUT, metavar="TRACKER"
    )
    save_adapter: bool = option(
        False, "With --lora-rank, also write the adapter, in the folder adapter of the output, for PEFT.", OUTPUT
    )
    save_every: int = option(
        0,
        "Save every N steps, so that --resume can continue; 0 saves only when Ctrl-C, SIGTERM or SIGHUP stops the run.",
        OUTPUT,
        min=0,
        metavar="N",
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions(TrainingOptions):
    """Options of an unlearning run."""

    drop_overlap: bool = option(False, OVERLAP_HELP, DATA)


@dataclass(frozen=True, kw_only=True)
class DemoOptions(BasicOptions):
    """Options of the demo."""

    seed: int = option(0, "Random seed for the made-up data, data order and stochastic rounding.", DATA)


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """What the teacher runs in, and which of its probabilities are stored.

    Attributes:
        top_k: maximum number of entries per position. With `top_k >= vocab_size` and `mass=1`, all tokens are stored.
        mass: each position stores the fewest most likely tokens whose probabilities sum to this value, at most `top_k`
            of them; in (0, 1]. With 1, every position stores `top_k` tokens.
        format: prompt format, as for `find_format`. The recipe that reads the cache must use the same.
        system: system message of a chat template.
        split: in a folder, read `retain_<split>.*` and `forget_<split>.*`.
        columns: which columns of the data hold what, such as "prompt=q,answer=a"; see `parse_columns`.
        drop_overlap: leave out retain and anchor rows that are also in the forget set, and anchor rows that are also
            in the retain set.
        self_generated: instead of a retain set, number of rows that the teacher writes itself.
        seed: random seed of the rows that the teacher writes.
        shots: for a base cache: number of similar retain examples that the teacher reads before each forget question,
            so that a model from before fine-tuning answers in the form of the data.
        max_length: examples are truncated to this many tokens.
        batch_tokens: number of positions per forward pass, padding included.
        dtype: dtype that the teacher runs in, 'bfloat16' or 'float32'.
        stored_dtype: dtype of the stored probabilities, 'float16' (relative error at most 2^-11) or 'float32'.
    """

    top_k: int = option(64, "Maximum number of entries per position.", TEACHER)
    mass: float = option(
        0.999,
        "Store the fewest most likely tokens whose probabilities sum to this value; 1 always stores --top-k.",
        TEACHER,
    )
    format: str = option(
        "auto", "Prompt format: auto, chat, plain, neko, tofu, or a template file; the recipe must use the same.", DATA
    )
    system: str = option("", "System message for the chat template; the recipe must use the same.", DATA)
    split: str | None = option(None, SPLIT_HELP, DATA)
    columns: str | None = option(None, COLUMNS_HELP, DATA, metavar="KEY=COLUMN,...")
    drop_overlap: bool = option(False, OVERLAP_HELP, DATA)
    self_generated: int = option(
        0, "Without RETAIN: let the teacher write N retain rows, stored in the cache as self_generated.jsonl.", DATA,
        min=0, metavar="N",
    )  # fmt: skip
    seed: int = option(0, "Random seed for --self-generated.", DATA)
    shots: int = option(
        0, "For a --base-cache: let the model read N similar retain rows before each forget question.", TEACHER,
        min=0, metavar="N",
    )  # fmt: skip
    max_length: int = option(512, "Truncate examples to this many tokens.", MEMORY)
    batch_tokens: int = option(8192, "Positions per forward pass, padding included.", MEMORY)
    dtype: str = option("bfloat16", "Dtype that the teacher runs in: bfloat16 or float32.", MEMORY)
    stored_dtype: str = option("float16", "Dtype of the stored probabilities: float16 or float32.", TEACHER)


@dataclass(frozen=True, kw_only=True)
class ScoreInputs:
    """Optional inputs and outputs of `score`. A measurement whose input is missing is reported as not measured."""

    mia: str | Path | None = option(
        None,
        "For membership inference: a folder with member.* and nonmember.*, or unseen documents of the same kind as the "
        "forget rows, which are then the members.",
        MEASUREMENTS,
    )
    split: str | None = option(None, SPLIT_HELP, DATA)
    columns: str | None = option(None, COLUMNS_HELP, DATA, metavar="KEY=COLUMN,...")
    drop_overlap: bool = option(False, OVERLAP_HELP, DATA)
    held: str | Path | None = option(
        None, "JSONL file of documents that no model was trained on; used to detect a broken model.", MEASUREMENTS
    )
    reference: str | Path | None = option(
        None,
        "Teacher cache with a reference model's losses of the --mia documents, for the reference attack.",
        COMPARISONS,
    )
    paraphrases: str | Path | None = option(
        None,
        "JSONL file of paraphrases: id, and input, or output with a list of wrong answers, or all three.",
        MEASUREMENTS,
    )
    mmlu: str | Path | None = option(
        None, "Folder with MMLU, in the layout of the hub or of its authors.", MEASUREMENTS
    )
    before: str | Path | None = option(
        None, "Score folder of the model before unlearning; adds differences with confidence intervals.", COMPARISONS
    )
    benchmark: str | None = option(
        None, "Benchmark that --data is the folder of: tofu or muse. Adds its metrics to the score.", DATA
    )
    tofu_split: str | None = option(None, "Split of --benchmark tofu: forget01, forget05 or forget10.", DATA)
    gold: str | Path | None = option(
        None,
        "Score folder of a retain-only model on the same --benchmark; for forget quality and privleak.",
        COMPARISONS,
    )
    official: str | Path | None = option(None, "Also write the results file of the shared task to this path.", OUTPUT)


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """How `score` measures a model."""

    shots: int | None = option(None, "Number of MMLU examples before each question.  [default: 5]", MEASUREMENTS, min=0)
    lm_eval: tuple[str, ...] = option(
        (), "Task of lm-evaluation-harness (needs neko-lean[lm-eval]); repeatable.", MEASUREMENTS, metavar="TASK"
    )
    attacks: tuple[str, ...] = option(
        (),
        "Attack that tries to recover the forget set: prefix, paraphrase, sample, quantize or relearn; repeatable.",
        MEASUREMENTS,
        flags=("--attack",),
    )
    relearn_lr: float | None = option(None, "Learning rate of --attack relearn.  [default: 1e-4]", MEASUREMENTS)
    format: str = option("auto", "Prompt format: auto, chat, plain, neko, tofu, or a template file.", GENERATION)
    system: str = option("", "System message for the chat template.", GENERATION)
    batch_size: int = option(32, "Maximum number of prompts generated together.", GENERATION)
    max_new_tokens: int | None = option(
        None, "Maximum number of tokens per generation.  [default: 256, as in the shared task]", GENERATION
    )
    seed: int | None = option(
        None,
        "Random seed for --attack sample, and for the examples that --attack relearn trains on.  [default: 0]",
        MEASUREMENTS,
    )
    dtype: str | None = option(None, "float32 or bfloat16.  [default: float32 on a CPU, bfloat16 on a GPU]", MEMORY)

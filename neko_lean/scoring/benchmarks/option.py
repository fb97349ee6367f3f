"""The option --benchmark of `score`: what it reads, how it generates, and the block `benchmark` of scores.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from neko_lean.data import Example, PromptFormat
from neko_lean.errors import NekoLeanError, did_you_mean
from neko_lean.jsonio import json_object
from neko_lean.options import ScoreInputs, ScoreSettings
from neko_lean.scoring.benchmarks import muse, tofu
from neko_lean.scoring.benchmarks.metrics import CHANCE_AUC
from neko_lean.scoring.benchmarks.muse import MuseRows, muse_format, muse_scores, read_muse
from neko_lean.scoring.benchmarks.tofu import tofu_scores
from neko_lean.scoring.benchmarks.tofu_rows import TOFU_SPLITS, TofuRows, read_tofu
from neko_lean.scoring.generation import Generation, GenerationLimits
from neko_lean.scoring.measure import ScoringContext
from neko_lean.scoring.score_folder import SCORES
from neko_lean.scoring.values import number, value_at

BENCHMARKS = ("tofu", "muse")
DEFAULT_MAX_NEW_TOKENS = 256  # the shared task's


@dataclass(frozen=True)
class Gold:
    """What the benchmarks need to know of a retain-only model.

    Attributes:
        model: its name.
        min_k_auc: AUC of the min-k attack on forget set and holdout set.
        truth_ratios: TOFU's truth ratio of each row of the forget set; None for MUSE.
    """

    model: str
    min_k_auc: float
    truth_ratios: list[float] | None


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that a model is scored on.

    Attributes:
        name: one of BENCHMARKS.
        rows: its rows.
        gold: the results of a retain-only model, if they were given.
    """

    name: str
    rows: TofuRows | MuseRows
    gold: Gold | None

    @property
    def split(self) -> str | None:
        """TOFU's split; None for MUSE."""
        return self.rows.split if isinstance(self.rows, TofuRows) else None

    @property
    def row_counts(self) -> dict[str, int]:
        """The number of rows of each set."""
        sets = {field.name: getattr(self.rows, field.name) for field in fields(self.rows)}
        return {name: len(rows) for name, rows in sets.items() if isinstance(rows, list)}


def check_benchmark(inputs: ScoreInputs, settings: ScoreSettings) -> None:
    """Raise NekoLeanError for options that do not fit --benchmark."""
    name = inputs.benchmark
    if name is None:
        for option, value in (("--tofu-split", inputs.tofu_split), ("--gold", inputs.gold)):
            if value is not None:
                raise NekoLeanError(f"{option} has no effect without --benchmark: give both or neither.")
        return

    if name not in BENCHMARKS:
        raise NekoLeanError(f"unknown benchmark {name!r}{did_you_mean(name, BENCHMARKS)}")
    if name == "tofu" and inputs.tofu_split is None:
        raise NekoLeanError(f"--benchmark tofu needs --tofu-split, one of {', '.join(TOFU_SPLITS)}.")
    if name != "tofu" and inputs.tofu_split is not None:
        raise NekoLeanError(f"--tofu-split has no effect with --benchmark {name}: leave it out.")
    determined: dict[str, object] = {
        "--split": inputs.split,
        "--columns": inputs.columns,
        "--max-new-tokens": settings.max_new_tokens,
    }
    given = next((option for option, value in determined.items() if value is not None), None)
    if given is not None:
        raise NekoLeanError(f"{given} has no effect with --benchmark, which determines it: leave it out.")


def read_benchmark(data: str | Path, inputs: ScoreInputs) -> Benchmark | None:
    """Read the benchmark that `inputs` asks for, and the results of the retain-only model.

    Raises:
        NekoLeanError: a file is missing or invalid, or the retain-only model was scored on something else.
    """
    if inputs.benchmark is None:
        return None
    rows = read_muse(data) if inputs.tofu_split is None else read_tofu(data, inputs.tofu_split)
    benchmark = Benchmark(inputs.benchmark, rows, None)
    if inputs.gold is None:
        return benchmark
    return Benchmark(inputs.benchmark, rows, read_gold(inputs.gold, benchmark))


def read_gold(path: str | Path, benchmark: Benchmark) -> Gold:
    """Read the scores of a retain-only model.

    Args:
        path: the folder that `score` wrote, or its scores.json.
        benchmark: what the model must have been scored on.

    Raises:
        NekoLeanError: the file cannot be read, or holds no scores of this benchmark, split and number of rows.
    """
    file = Path(path) / SCORES if Path(path).is_dir() else Path(path)
    try:
        scores = json_object(file)
    except OSError as error:
        raise NekoLeanError(
            f"--gold {file} cannot be read ({error.strerror}); give the score folder of a retain-only model."
        ) from error
    block = value_at(scores, "benchmark")
    again = "score the retain-only model with the same --benchmark and --data"
    if not isinstance(block, dict):
        raise NekoLeanError(f"--gold {file} holds no scores of a benchmark; {again}.")

    for key, expected in (("name", benchmark.name), ("split", benchmark.split), ("rows", benchmark.row_counts)):
        if block.get(key) != expected:
            raise NekoLeanError(
                f"--gold {file}: its benchmark has the {key} {block.get(key)}, not {expected}; {again}."
            )
    return _checked_gold(file, str(value_at(scores, "model")), block, benchmark, again)


def _checked_gold(file: Path, model: str, block: dict[str, Any], benchmark: Benchmark, again: str) -> Gold:
    """The values of a retain-only model's block `benchmark`."""
    area = number(block, "min_k_auc")
    if area is None or not 0 <= area <= 1:
        raise NekoLeanError(f"--gold {file}, key benchmark.min_k_auc: expected a number from 0 to 1; {again}.")
    if not isinstance(benchmark.rows, TofuRows):
        return Gold(model, area, None)

    stored = block.get("truth_ratios")
    ratios = [number({"ratio": ratio}, "ratio") for ratio in stored] if isinstance(stored, list) else []
    valid = [ratio for ratio in ratios if ratio is not None]
    if len(valid) < len(ratios) or len(valid) != len(benchmark.rows.forget):
        raise NekoLeanError(
            f"--gold {file}, key benchmark.truth_ratios: expected {len(benchmark.rows.forget)} numbers, one for each "
            f"forget row; {again}."
        )
    return Gold(model, area, valid)


def limits_of(benchmark: Benchmark | None, settings: ScoreSettings) -> GenerationLimits:
    """Where the generations of the ordinary score end: as the benchmark's, so that it can use them."""
    if benchmark is None:
        return GenerationLimits(settings.batch_size, settings.max_new_tokens or DEFAULT_MAX_NEW_TOKENS)
    if isinstance(benchmark.rows, TofuRows):
        return tofu.generation_limits(settings.batch_size)
    return muse.generation_limits(settings.batch_size)


def format_of(benchmark: Benchmark | None, prompts: PromptFormat) -> PromptFormat:
    """The prompt format of a benchmark.

    Raises:
        NekoLeanError: the benchmark's own wording replaces the format.
    """
    if benchmark is None or isinstance(benchmark.rows, TofuRows):
        return prompts
    own = muse_format(prompts)
    if prompts.name != "plain" and not own.render(benchmark.rows.forget_knowledge[0]).has_special_tokens:
        raise NekoLeanError(
            f"--format {prompts.label} has no effect with --benchmark muse, whose questions have their own wording: "
            f"use plain or a chat template."
        )
    return own


def benchmark_scores(
    context: ScoringContext,
    benchmark: Benchmark | None,
    examples: Sequence[Example],
    generations: Sequence[Generation],
) -> dict[str, Any] | None:
    """The block `benchmark` of scores.json.

    Args:
        context: the model.
        benchmark: the benchmark; without one, the block is None.
        examples: the examples of the ordinary score.
        generations: their generations with `limits_of` the benchmark.
    """
    if benchmark is None:
        return None
    rows, gold = benchmark.rows, benchmark.gold
    texts = {example.id: generation.text for example, generation in zip(examples, generations, strict=True)}
    area = CHANCE_AUC if gold is None else gold.min_k_auc
    if isinstance(rows, TofuRows):
        scores = tofu_scores(context, rows, None if gold is None else gold.truth_ratios, area, texts)
    else:
        # Its questions are limited to fewer tokens than the ordinary score generates.
        continuations = {example.id: texts[example.id] for example in rows.verbatim}
        scores = muse_scores(context, rows, area, continuations)
    return {
        "name": benchmark.name,
        "split": benchmark.split,
        "gold": None if gold is None else gold.model,
        "rows": benchmark.row_counts,
        **scores,
    }

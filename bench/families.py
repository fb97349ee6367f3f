"""Run every causal family of the installed transformers, built small, through all that neko-lean does with a model.

    .venv/bin/python bench/families.py [--only NAME ...] [--jobs 2] [--timeout 120] [--json families.json]

Each family runs in a separate process, so that a crash or a hang affects no other family. The reference of every check
is plain transformers on one row at a time: no padding, no mask, no cache, evaluation mode, float32.

    logp       log-probabilities of rows padded together, in float32 and bfloat16
    gradients  loss, KL and every parameter's gradient of one step of `unlearn`, teacher with k = V
    generate   token ids of prompts of different lengths, generated together
    save       `unlearn` for two steps in float32 and one in bfloat16: KL of the student to its own teacher before the
               first update; the output reloads without a missing key and with the weights that were trained; it can be
               cached and scored

Outcomes: layerwise; fallback, to checkpointed or plain training; refused, with one sentence; SILENT DIFFERENCE;
TRACEBACK; not built. The exit code is 1 if there is a silent difference or a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from family_checks import CHECKS
from family_list import VARIANTS
from family_models import Differs, Family, Result
from family_tools import one_line, where
from small_models import FAMILIES, SKIPPED

from neko_lean.errors import NekoLeanError


def run_checks(family: Family, names: Sequence[str]) -> Result:
    """Run the named checks, each with its own outcome, and return the family's result."""
    result = family.result
    for name in names:
        stderr = io.StringIO()
        try:
            with contextlib.redirect_stderr(stderr):
                CHECKS[name](family)
            result.checks[name] = "ok"
        except NekoLeanError as error:
            result.checks[name] = "refused"
            result.reasons.append(f"{name}: {error}")
        except Differs as error:
            result.checks[name] = "DIFFERS"
            result.reasons.append(f"{name}: {error}")
        except Exception as error:
            result.checks[name] = "TRACEBACK"
            result.reasons.append(f"{name}: {type(error).__name__}: {one_line(error)} at {where(error)}")
        result.warnings += [line for line in stderr.getvalue().splitlines() if line.startswith("warning:")]

    result.warnings, result.notes = (list(dict.fromkeys(lines)) for lines in (result.warnings, result.notes))
    result.outcome = outcome(family)
    return result


def outcome(family: Family) -> str:
    """The outcome of a family, from those of its checks."""
    result = family.result
    outcomes = set(result.checks.values())
    if not family.causal and "ok" in outcomes:
        result.reasons.insert(0, "its attention is not causal, and it was not refused")
        return "SILENT DIFFERENCE"
    if "DIFFERS" in outcomes:
        return "SILENT DIFFERENCE"
    if "TRACEBACK" in outcomes:
        return "TRACEBACK"
    if outcomes == {"refused"}:
        result.reasons = [result.reasons[0].partition(": ")[2]]
        return "refused"
    if "refused" in outcomes:
        return "partly refused"
    if result.backward in ("", "layerwise"):
        return result.backward or "ok"
    return f"fallback: {result.backward}"


def one_family(name: str, checks: Sequence[str], out: Path) -> None:
    """Check one family and write its result; runs in a separate process."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    # The libraries write to stderr directly; discard that.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if name in SKIPPED:
        out.write_text(json.dumps(vars(Result("not built", reasons=[SKIPPED[name]]))))
        return
    start = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="family-"))
    try:
        try:
            family = Family(name, work)
        except Exception as error:
            result = Result("not built", reasons=[f"{type(error).__name__}: {one_line(error)} at {where(error)}"])
        else:
            result = run_checks(family, checks)
        result.seconds = time.monotonic() - start
        out.write_text(json.dumps(vars(result)))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def sweep(
    names: Sequence[str], checks: Sequence[str], jobs: int, timeout: float, path: Path | None
) -> dict[str, Result]:
    """Check all families, `jobs` at a time; the results so far are in the JSON file at `path`."""
    fork = multiprocessing.get_context("fork")  # the libraries are imported once
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as folder:
        waiting = list(enumerate(names))
        running: dict[str, tuple[Any, float, Path]] = {}
        while waiting or running:
            while waiting and len(running) < jobs:
                number, name = waiting.pop(0)
                report = Path(folder) / f"{number}.json"
                process = fork.Process(target=one_family, args=(name, checks, report))
                process.start()
                running[name] = process, time.monotonic(), report
            time.sleep(0.05)
            for name, (process, start, report) in list(running.items()):
                late = time.monotonic() - start > timeout
                if process.is_alive() and not late:
                    continue
                if process.is_alive():
                    process.kill()
                process.join()
                if report.is_file():
                    results[name] = Result(**json.loads(report.read_text()))
                else:
                    reason = (
                        f"not finished after {timeout:.0f} s" if late else f"died with exit code {process.exitcode}"
                    )
                    results[name] = Result("TRACEBACK", reasons=[reason], seconds=time.monotonic() - start)
                del running[name]
                result = results[name]
                progress = (
                    f"{len(results)}/{len(names)} {name}: {result.outcome} {result.seconds:.1f} s {result.reasons}"
                )
                print(progress, file=sys.stderr, flush=True)
                if path:
                    path.write_text(json.dumps({key: vars(value) for key, value in results.items()}, indent=1) + "\n")
    return {name: results[name] for name in names}


def table(results: dict[str, Result]) -> str:
    """The results as a Markdown table."""
    lines = ["| family | outcome | logp | gradients | generate | save | reasons |", "|---|---|---|---|---|---|---|"]
    for name, result in results.items():
        checks = " | ".join(result.checks.get(key, "") for key in CHECKS)
        lines.append(f"| {name} | {result.outcome} | {checks} | {'; '.join(dict.fromkeys(result.reasons))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="families or variants; default: all")
    parser.add_argument("--checks", nargs="+", metavar="CHECK", choices=[*CHECKS], default=[*CHECKS])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=120, help="largest number of seconds for one family")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    known = [*FAMILIES, *VARIANTS]
    unknown = [name for name in options.only or [] if name not in known]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")

    start = time.monotonic()
    results = sweep(options.only or known, options.checks, options.jobs, options.timeout, options.json)
    print(table(results))
    counts: dict[str, int] = {}
    for result in results.values():
        counts[result.outcome] = counts.get(result.outcome, 0) + 1
    print(f"\n{', '.join(f'{count} {outcome}' for outcome, count in sorted(counts.items()))}; "
          f"{time.monotonic() - start:.0f} s, transformers {transformers.__version__}")  # fmt: skip
    sys.exit(any(result.outcome in ("SILENT DIFFERENCE", "TRACEBACK") for result in results.values()))


if __name__ == "__main__":
    main()

"""Everything that is to be measured on one NVIDIA GPU, in one command of at most 9 minutes, without network.

    python bench/gpu.py --lume LUME --wheels WHEELS --out bench-gpu
    python bench/gpu.py --dry-run --out /tmp/dry-run      # all sections at toy sizes on a CPU; its numbers mean nothing

Run it from a checkout; nothing needs to be installed except the dependencies of neko-lean, pytest and hypothesis.
Packages that the machine lacks can be carried along as wheels in a folder. Weights are random and drawn on the GPU.
The rows of the steps are LUME's if a folder is given, otherwise made-up rows of the same lengths.

Sections run in the order of their worth, each in a separate process with a time limit. A section that fails, or for
which no time is left, is named with the reason. results.json, report.txt and report.md are written after every section.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpu_report import write_report

ROOT = Path(__file__).parents[1]
WORKER = ROOT / "bench" / "gpu_worker.py"
ANSWER = "@answer "  # what a line of a worker starts with that answers a request
# Time limit of each section in seconds, most important section first. They mostly take a fraction of it.
SECTIONS = {
    "machine": 90,
    "step": 60,
    "two bf16 models": 50,
    "step both offloads": 60,
    "head": 90,
    "tests": 150,
    "24 GB": 60,
    "24 GB both offloads": 90,
    "24 GB QLoRA": 60,
    "step offload_state": 45,
    "step offload_activations": 45,
    "score": 60,
    "step compile": 80,
    "two fp32 models": 50,
    "step state_bits=4": 60,
    "step backward=checkpointed": 45,
    "step default kernels": 45,
}
LEAST_SECONDS = 12  # a section is not started with less
RESERVE = 5  # seconds for ending the last section
DRY_RUN_FACTOR = 4  # limits of a dry run, on a CPU that may be busy
SPARE_CORES = 8  # with fewer, a worker that starts while another measures would disturb it


class Worker:
    """A process of gpu_worker.py. It imports what sections need before its first request."""

    def __init__(self, log: Path, environment: dict[str, str], script: Path = WORKER) -> None:
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(script)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True, env=environment,
                start_new_session=True,
            )  # fmt: skip
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                self.lines.put(line.removeprefix(ANSWER))
        self.lines.put(None)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The section's result, or `{"error": ...}` if it fails. A worker that exceeds the time is killed."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.lines.get(timeout=request["seconds"])
        except queue.Empty:
            self.stop()
            return {"error": f"did not finish within {request['seconds']:.0f} s"}
        except OSError:
            line = None
        if line is None:
            code = self.process.wait()
            return {"error": f"the process ended with exit code {code}: {last_line(self.log)}"}
        result: dict[str, Any] = json.loads(line)
        return result

    def stop(self) -> None:
        """Kill the worker and the processes that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def install_wheels(folder: Path, target: Path) -> str | None:
    """Unpack wheels into `target`, without an index and without dependencies; returns what could not be installed."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    wheels = sorted(map(str, folder.glob("*.whl")))
    if not wheels:
        raise SystemExit(f"{folder} holds no wheels; give a folder with *.whl files, or leave out --wheels.")
    failed = []
    if subprocess.run([*pip, "--target", str(target), *wheels], capture_output=True).returncode:
        # One wheel that does not fit this Python must not cost the others.
        for wheel in wheels:
            if subprocess.run([*pip, "--target", str(target), "--upgrade", wheel], capture_output=True).returncode:
                failed.append(Path(wheel).name)
    return f"not installed: {', '.join(failed)}" if failed else None


def environment(out: Path, dry_run: bool) -> dict[str, str]:
    """Environment of the workers: this checkout and the carried packages first."""
    paths = [str(ROOT), str(out / "packages"), os.environ.get("PYTHONPATH", "")]
    changed = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if dry_run:  # no GPU, no compiler: compiled code runs uncompiled, Triton's in its interpreter
        changed |= {"CUDA_VISIBLE_DEVICES": "", "TORCH_COMPILE_DISABLE": "1", "TRITON_INTERPRET": "1"}
    return {**os.environ, **changed}


def run_sections(options: argparse.Namespace, deadline: float, results: dict[str, Any]) -> None:
    """Run the sections that fit before `deadline`, and write the results after each."""
    variables, numbers = environment(options.out, options.dry_run), itertools.count()

    def start() -> Worker:
        return Worker(options.out / f"worker-{next(numbers)}.log", variables)

    keeps_spare = not options.dry_run and (os.cpu_count() or 1) >= SPARE_CORES
    names = [name for name in SECTIONS if name == "machine" or not options.only or name in options.only]
    worker: Worker | None = start()
    spare: Worker | None = None
    try:
        for number, name in enumerate(names):
            left = deadline - time.monotonic() - RESERVE
            if left < LEAST_SECONDS:
                results["left_out"][name] = "no time left"
                continue
            if keeps_spare and number + 1 < len(names):
                spare = start()
            worker = worker or start()

            print(f"[{left:4.0f} s left] {name} ...", flush=True)
            limit = SECTIONS[name] * (DRY_RUN_FACTOR if options.dry_run else 1)
            result = worker.answer(request(name, min(limit, left), options))
            record(name, result, results)
            report(results, options.out)

            # On a GPU every section gets a new process; a dry run saves the time of the imports.
            if not options.dry_run or worker.process.poll() is not None:
                worker.stop()
                worker, spare = spare, None
            if name == "machine" and "error" in result:
                raise SystemExit(f"{result['error']} Use --dry-run to try the sections on a CPU.")
    finally:
        for process in (worker, spare):
            if process is not None:
                process.stop()


def request(name: str, seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    """What a worker needs to know about a section."""
    arguments = {"lume": str(options.lume) if options.lume else None} if name == "machine" else {}
    device = "cpu" if options.dry_run else "cuda"
    return {
        "section": name, "seconds": seconds, "folder": str(options.out), "device": device, "toy": options.dry_run,
        "arguments": arguments,
    }  # fmt: skip


def record(name: str, result: dict[str, Any], results: dict[str, Any]) -> None:
    """Add a section's result, or the reason why there is none, and print how it ended."""
    if "error" in result:
        results["left_out"][name] = result["error"]
        print(f"    failed: {result['error']}", flush=True)
        return
    results["sections"][name] = result
    print(f"    {result['took']:.1f} s", flush=True)


def report(results: dict[str, Any], out: Path) -> None:
    """Write the report. A fault in it must not cost the sections that have not run yet; results.json comes first."""
    try:
        write_report(results, out)
    except Exception as error:
        print(f"    the report could not be written ({error!r}); results.json has everything", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lume", type=Path, help="folder with LUME's public splits; default: made-up rows")
    parser.add_argument("--wheels", type=Path, help="folder with wheels of packages that the machine lacks")
    parser.add_argument("--minutes", type=float, default=9, help="time for everything (default: 9)")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="run only this section; repeatable")
    parser.add_argument("--dry-run", action="store_true", help="all sections at toy sizes on a CPU")
    parser.add_argument("--out", type=Path, default=Path("bench-gpu"), help="folder for results, created if missing")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes

    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "when": time.strftime("%Y-%m-%d %H:%M"), "dry_run": options.dry_run, "sections": {}, "left_out": {},
    }  # fmt: skip
    if options.wheels is not None:
        failed = install_wheels(options.wheels, options.out / "packages")
        if failed:
            results["left_out"]["wheels"] = failed
    run_sections(options, deadline, results)
    report(results, options.out)
    print((options.out / "report.txt").read_text())


if __name__ == "__main__":
    main()

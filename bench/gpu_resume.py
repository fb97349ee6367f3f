"""Train on a GPU twice, and a third time killed with SIGKILL at a random step and resumed: are all bytes equal?

    .venv/bin/python bench/gpu_resume.py MODEL DATA --out gpu-resume.json

MODEL is a small checkpoint, DATA a folder with forget.* and retain.*. Each run is a separate process, because a forked
child cannot use CUDA once its parent has (bench/kill.py forks, on a CPU). One trial per job, all jobs at the same time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

STEPS = 24
TIMES = ("wait_seconds", "seconds", "measured_peak")
SHORT = {"max_steps": STEPS, "max_length": 512, "forget_rows": 8, "retain_rows": 8, "lr": 1e-4}
# Each job: a recipe and the values that it changes.
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "calibrated, chosen by quality": ("calibrated", {"eval_every": 4, "eval_rows": 8, "choose": "quality"}),
    "neko in float32": ("neko", {"dtype": "float32"}),
    "npo, plain backward, dropout": ("npo", {"backward": "plain", "dropout": "true"}),
    "neko, both offloads": ("neko", {"offload_state": "true", "offload_activations": "true"}),
}


def command(name: str, model: Path, data: Path, out: Path) -> list[str]:
    recipe, change = JOBS[name]
    arguments = [sys.executable, "-m", "neko_lean", "unlearn", model, "--forget", data, "--retain", data, "--out", out]
    values = [f"--set={key}={value}" for key, value in {**SHORT, **change}.items()]
    return [*map(str, arguments), "--recipe", recipe, "--seed", "3", "--save-every", "3", "--quiet", *values]


def finish(words: list[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")


def kill(words: list[str], out: Path, at: int) -> int:
    """Start a run and kill it after `at` steps; return the number of steps that it had completed."""
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics, steps = out.parent / f".{out.name}.saved" / "metrics.jsonl", 0
    while child.poll() is None:
        if metrics.is_file():
            steps = len(metrics.read_text().splitlines())
        if steps >= at:
            child.kill()
            child.wait()
            return steps
        time.sleep(0.005)
    raise SystemExit(f"the run ended with exit code {child.returncode} before it could be killed at step {at}.")


def result(out: Path) -> tuple[str, list[dict[str, Any]]]:
    """What must be equal: the checksum of the weights, and the metrics without times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    return digest, [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def trial(model: Path, data: Path, root: Path, name: str) -> dict[str, Any]:
    outs = [root / f"{list(JOBS).index(name)}-{way}" for way in ("whole", "again", "cut")]
    words = [command(name, model, data, out) for out in outs]
    with ThreadPoolExecutor(3) as pool:
        complete = [pool.submit(finish, line) for line in words[:2]]
        killed = pool.submit(kill, words[2], outs[2], random.randint(4, STEPS - 4)).result()
        for run in complete:
            run.result()
    finish([*words[2], "--resume"])
    first, second, resumed = map(result, outs)
    return {"killed after step": killed, "twice the same": first == second, "resumed the same": first == resumed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("gpu-resume.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(len(JOBS)) as pool:
        trials = pool.map(partial(trial, options.model, options.data, Path(scratch)), JOBS)
        results = dict(zip(JOBS, trials, strict=True))
    print(json.dumps(results, indent=1))
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""How much faster one checkout's training step and `score` are on a CPU than another's, at SmolLM2-135M's shape.

    .venv/bin/python bench/cpu_speed.py LUME --before PATH [--rows 60] [--rounds 3] [--threads 2]

LUME is the folder with the dataset's public splits, PATH another checkout of this repository. The model has random
float32 weights (V 49,152, d 576, 30 layers, tied). Both checkouts take the same steps of recipe `neko` (4 forget and 4
retain examples) and score the same validation rows, in separate processes and in turn. The table shows medians and
their ratios, in wall time and in CPU time, which other work on the machine changes less. The losses, the weights after
the steps, the generations and the scores of both must be equal; otherwise it ends with exit code 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

EXAMPLES = 4  # of each set per step
STEPS = 3  # different examples each; the first one warms up
CHECKOUT = Path(__file__).resolve().parents[1]


def prepare(work: Path, lume: Path, rows: int) -> None:
    """Write model/, cache/, the examples of a step, and in validation/ the rows to score, unless they exist already."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from neko_lean.cache import CacheOptions, cache_teacher
    from neko_lean.data.examples import read_rows
    from neko_lean.demo.base_model import write_base
    from neko_lean.jsonio import write_jsonl
    from neko_lean.options import OutputOptions

    for split in ("forget", "retain"):
        examples = read_rows(lume, split, "validation")
        (work / "validation").mkdir(parents=True, exist_ok=True)
        chosen = examples[:: max(1, 2 * len(examples) // rows)][: rows // 2]
        write_jsonl(work / "validation" / f"{split}.jsonl", [example.lume_row for example in chosen])
    if (work / "ready").is_file():
        return
    splits = {name: read_rows(lume, name, "train") for name in ("forget", "retain")}
    write_base(work / "model", [*splits["forget"], *splits["retain"]], vocabulary=49_100)
    for name, examples in splits.items():
        count = STEPS * EXAMPLES
        write_jsonl(work / f"{name}.jsonl", map(asdict, examples[:: len(examples) // count][:count]))
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=8192, pad_token_id=1, eos_token_id=0,
        bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(work / "model")
    cache_teacher(
        work / "model",
        work / "cache",
        retain=work,
        cache=CacheOptions(max_length=128, format="neko"),
        run=OutputOptions(device="cpu", overwrite=True),
    )
    (work / "ready").touch()


def measure_steps(work: Path) -> dict[str, Any]:
    """Take the steps and return the times of all but the first, the losses, and a digest of the weights."""
    from neko_lean.cache import TeacherCache
    from neko_lean.data.examples import read_rows
    from neko_lean.data.tokenization import encode
    from neko_lean.models.loading import load_model, load_tokenizer
    from neko_lean.recipe import load_recipe
    from neko_lean.training.batch import make_batch
    from neko_lean.training.layers import decoder_layers
    from neko_lean.training.layerwise import LayerPass
    from neko_lean.training.losses import batch_losses
    from neko_lean.training.optimizer import InBackwardAdam8bit

    device = torch.device("cpu")
    lm, recipe, tokenizer = (
        load_model(work / "model", torch.float32, device), load_recipe("neko"), load_tokenizer(work / "model"),
    )  # fmt: skip
    lm.model.eval()
    cache = TeacherCache(work / "cache")
    forget, retain = (encode(read_rows(work, name), tokenizer, "neko", 128) for name in ("forget", "retain"))
    optimizer = InBackwardAdam8bit(lm.model.named_parameters(), weight_decay=0.01)
    layer_pass = LayerPass(lm, decoder_layers(lm))
    update = {"wall": 0.0, "cpu": 0.0}

    def timed_update(parameter: torch.nn.Parameter) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        optimizer.update(parameter)
        update["wall"] += time.perf_counter() - wall
        update["cpu"] += time.process_time() - cpu

    seconds: dict[str, list[float]] = {f"{part} {clock}": [] for part in ("step", "update") for clock in update}
    losses = []
    for start in range(0, STEPS * EXAMPLES, EXAMPLES):
        rows = slice(start, start + EXAMPLES)
        batch = make_batch(forget[rows], retain[rows], cache, recipe, 1, device)
        update.update(wall=0.0, cpu=0.0)
        optimizer.begin_step(5e-5)
        wall, cpu = time.perf_counter(), time.process_time()
        loss = batch_losses(layer_pass.forward(batch.micro), lm, batch, recipe)["loss"]
        loss.backward()
        layer_pass.backward(timed_update)
        seconds["step wall"].append(time.perf_counter() - wall)
        seconds["step cpu"].append(time.process_time() - cpu)
        seconds["update wall"].append(update["wall"])
        seconds["update cpu"].append(update["cpu"])
        losses.append(float(loss))

    digest = hashlib.sha256()
    for parameter in lm.model.parameters():
        digest.update(parameter.detach().numpy())
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    return {"seconds": medians, "result": {"losses": losses, "weights": digest.hexdigest()}}


def measure_score(work: Path, out: Path) -> dict[str, Any]:
    """Score the validation rows, and return the time and digests of the generations and numbers."""
    from neko_lean.options import OutputOptions, ScoreSettings
    from neko_lean.scoring.run import score

    wall, cpu = time.perf_counter(), time.process_time()
    scores = score(
        work / "model",
        out,
        data=work / "validation",
        settings=ScoreSettings(dtype="float32"),
        run=OutputOptions(overwrite=True, quiet=True, device="cpu"),
    )
    seconds = {"score wall": time.perf_counter() - wall, "score cpu": time.process_time() - cpu}
    for key in ("wall_seconds", "peak_memory", "made_from"):
        del scores[key]
    files = {"scores": json.dumps(scores).encode(), "generations": (out / "generations.jsonl").read_bytes()}
    return {"seconds": seconds, "result": {name: hashlib.sha256(text).hexdigest() for name, text in files.items()}}


def run(checkout: Path, part: str, work: Path, out: Path, threads: int) -> dict[str, Any]:
    """Measure one part with the code of one checkout, in a separate process."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, str(work), "--measure", part, "--out", str(out)]
    completed = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True)
    if completed.returncode:
        raise SystemExit(
            f"{part} of {checkout} ended with exit code {completed.returncode}:\n{completed.stderr[-2000:]}"
        )
    result: dict[str, Any] = json.loads(completed.stdout.splitlines()[-1])
    return result


def table(runs: dict[str, list[dict[str, Any]]], threads: int) -> Table:
    """Median seconds of each part before and after, and their ratio."""
    rows = Table(title=f"SmolLM2-135M's shape, float32, {threads} threads", title_justify="left")
    for column in ("seconds", "before", "after", "before / after"):
        rows.add_column(column, justify="left" if column == "seconds" else "right")
    for name in sorted({name for results in runs.values() for result in results for name in result["seconds"]}):
        before, after = (
            statistics.median(r["seconds"][name] for r in runs[which] if name in r["seconds"])
            for which in ("before", "after")
        )
        rows.add_row(name, f"{before:.2f}", f"{after:.2f}", f"{before / after:.2f}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="LUME", help="folder with LUME's public splits")
    parser.add_argument("--before", type=Path, help="the other checkout")
    parser.add_argument("--parts", nargs="+", choices=("step", "score"), default=["step", "score"])
    parser.add_argument("--rows", type=int, default=60, help="validation rows to score, half of them forget rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=Path("/tmp/neko-lean-cpu-speed"), help="work folder (1 GB), kept")
    parser.add_argument("--measure", choices=("step", "score"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("bench-cpu-speed.json"))
    options = parser.parse_args()
    if options.measure:
        work = options.folder
        result = measure_steps(work) if options.measure == "step" else measure_score(work, options.out)
        print(json.dumps(result))
        return
    if options.before is None:
        parser.error("--before is required: another checkout to compare with")
    prepare(options.work, options.folder, options.rows)

    checkouts = {"before": options.before.resolve(), "after": CHECKOUT}
    runs: dict[str, list[dict[str, Any]]] = {which: [] for which in checkouts}
    equal = True
    for number in range(options.rounds):
        for part in options.parts:
            results = {}
            for which, checkout in checkouts.items():
                results[which] = run(checkout, part, options.work, options.work / f"scores-{which}", options.threads)
                runs[which].append({"part": part, **results[which]})
                print(f"round {number + 1}, {part} {which}: {json.dumps(results[which]['seconds'])}", flush=True)
            before, after = (results[which]["result"] for which in checkouts)
            equal &= before == after
            print(f"round {number + 1}, {part}: {'equal results' if before == after else f'{before} is not {after}'}")
    Console(width=120).print(table(runs, options.threads))
    options.out.write_text(json.dumps(runs, indent=1) + "\n")
    if not equal:
        raise SystemExit("the results of the two checkouts differ")


if __name__ == "__main__":
    main()

"""Peak memory and speed of `unlearn` compared with trainers that others wrote, on the same rows of LUME.

    .venv/bin/python bench/peers.py LUME --model SmolLM2-135M --open-unlearning open-unlearning \\
        --open-unlearning-python venv-ou/bin/python --trl-python venv-trl/bin/python

Nothing is downloaded: `--open-unlearning` is a checkout of locuslab/open-unlearning, and each `--*-python` is the
interpreter of an environment with that project's requirements and bitsandbytes. A contender without its path is
skipped by name. Without `--model`, the weights are random: SmolLM2-135M's shape on a CPU, OLMo-1B-0724's on a GPU.

Every step of every contender has the same forget and retain rows, and each contender runs in a separate process, in
turn, `--rounds` times. Ratios are taken within a round. Peaks are above what the process holds after its imports: the
resident set, sampled every 10 ms, on a CPU, and what PyTorch allocated on a GPU. Times on a CPU are those for which the
process computed, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from contenders import device_name, random_olmo_1b
from peer_list import CONTENDERS, OBJECTIVES, Contender, job_of
from peer_runs import BENCH, Run, run_worker
from peer_table import table
from transformers import LlamaConfig, LlamaForCausalLM

from neko_lean.data.examples import read_rows
from neko_lean.demo.base_model import write_base
from neko_lean.jsonio import write_jsonl
from neko_lean.models.devices import pick_device
from neko_lean.models.loading import load_tokenizer
from neko_lean.recipe import load_recipe
from neko_lean.runs.examples import prepare_examples

FORMAT = "plain"
MIN_ANSWER = 8  # tokens of an answer that truncation must leave


def write_model(out: Path, model: Path | None, lume: Path, device: torch.device) -> None:
    """Write a checkpoint that every contender reads: a copy of `model`, or one with random weights."""
    out.mkdir(parents=True)
    if model is not None:
        for file in model.iterdir():
            (out / file.name).symlink_to(file.resolve())
    else:
        # A tokenizer as large as the real one, trained on the rows, so that nothing is downloaded from the hub.
        rows = [row for name in ("forget", "retain") for row in read_rows(lume, name, "train")]
        write_base(out, rows, vocabulary=49152)
        torch.manual_seed(0)
        weights = random_olmo_1b() if device.type == "cuda" else random_smollm2(load_tokenizer(out).pad_token_id)
        weights.save_pretrained(out)

    # Older versions of transformers read the base of RoPE from another key.
    config = json.loads((out / "config.json").read_text())
    config["rope_theta"] = (config.get("rope_parameters") or config).get("rope_theta", 10000.0)
    (out / "config.json").unlink()
    (out / "config.json").write_text(json.dumps(config, indent=1))


def random_smollm2(pad_token_id: int) -> LlamaForCausalLM:
    """A model of SmolLM2-135M's shape with random weights, in float32."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, pad_token_id=pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def write_sets(work: Path, lume: Path, rows: int, max_length: int) -> dict[str, Any]:
    """Write the rows of every step as data sets for `unlearn` and as token ids for the others.

    Returns "pad_id", and "tokens": the number of real tokens in each of the sets "forget", "retain" and "refusal".
    """
    tokenizer = load_tokenizer(work / "model")
    recipe = load_recipe("dpo", {"format": FORMAT, "max_length": max_length})
    sets = [[row for row in read_rows(lume, name, "train") if row.kind != "document"] for name in ("forget", "retain")]
    prepared = prepare_examples(*sets, [], recipe, tokenizer, max_length, 0)
    long_enough = [n for n, row in enumerate(prepared.forget) if len(row) - row.prompt_length >= MIN_ANSWER]
    forget = long_enough[:: len(long_enough) // rows][:rows]
    retain = range(0, len(sets[1]), len(sets[1]) // rows)[:rows]

    chosen = {
        "forget": [prepared.forget[n] for n in forget],
        "refusal": [prepared.substitutes[n] for n in forget],
        "retain": [prepared.retain[n] for n in retain],
    }
    (work / "rows").mkdir()
    for name in ("forget", "retain"):
        write_jsonl(work / "rows" / f"{name}.jsonl", [asdict(row.example) for row in chosen[name]])
    encoded = {
        name: [{"input_ids": row.input_ids, "prompt_length": row.prompt_length} for row in examples]
        for name, examples in chosen.items()
    }
    (work / "sets.json").write_text(json.dumps(encoded))
    tokens = {name: sum(map(len, examples)) for name, examples in chosen.items()}
    return {"pad_id": tokenizer.pad_token_id, "tokens": tokens}


def skipped(contender: Contender, options: argparse.Namespace) -> str | None:
    """Why a contender cannot run with these options; None if it can."""
    for name in contender.needs:
        path = getattr(options, name.replace("-", "_"))
        if path is None:
            return f"no --{name} given"
        if not path.exists():
            return f"--{name} {path} does not exist"
    return None


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Prepare the work folder, cache the teacher, and run every contender of every objective, in turn.

    Returns the runs by objective and contender, the teacher's pass, the tokens of each set, and why a contender was
    skipped. They are written to `options.out` after each run.
    """
    common = prepare(options, device)
    skips = {contender.name: skipped(contender, options) for contender in CONTENDERS}

    def run(contender: Contender, objective: str, caches: bool = False) -> Run:
        interpreter = getattr(options, contender.python) if contender.python else sys.executable
        job = {**common, **job_of(contender, objective, common), "caches": caches}
        return run_worker(str(interpreter), BENCH / contender.script, job, options.work)

    teacher = run(CONTENDERS[0], options.objectives[0], caches=True)
    if teacher.error:
        raise SystemExit(f"the teacher cache failed: {teacher.error}")

    runs: dict[str, dict[str, list[Run]]] = {objective: {} for objective in options.objectives}
    results = {"runs": runs, "teacher": teacher, "tokens": common["tokens"], "skipped": skips}
    for number, objective in itertools.product(range(options.rounds), options.objectives):
        for contender in CONTENDERS:
            if objective in contender.objectives and skips[contender.name] is None:
                result = run(contender, objective)
                runs[objective].setdefault(contender.name, []).append(result)
                print(f"round {number + 1}, {objective}, {contender.name}: {result.summary()}", flush=True)
                options.out.write_text(json.dumps(results, default=asdict, indent=1) + "\n")
    return results


def prepare(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Write the model and the rows into the work folder. Returns what all jobs share."""
    work: Path = options.work
    write_model(work / "model", options.model, options.lume, device)
    return {
        "model": str(work / "model"),
        "rows": str(work / "rows"),
        "sets": str(work / "sets.json"),
        "cache": str(work / "cache"),
        "out": str(work / "out"),
        "device": str(device),
        "dtype": "bfloat16" if device.type == "cuda" else "float32",
        "steps": options.steps,
        "rows_per_step": options.rows,
        "format": FORMAT,
        "max_length": options.max_length,
        "open_unlearning": str(options.open_unlearning),
        **write_sets(work, options.lume, options.rows, options.max_length),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lume", type=Path, help="folder with LUME's public splits")
    parser.add_argument("--open-unlearning", type=Path, help="checkout of locuslab/open-unlearning")
    parser.add_argument("--open-unlearning-python", type=Path, help="interpreter with its requirements")
    parser.add_argument("--trl-python", type=Path, help="interpreter with trl")
    parser.add_argument("--model", type=Path, help="checkpoint to train; random weights by default")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--rows", type=int, default=8, help="forget rows per step, and retain rows per step")
    parser.add_argument("--max-length", type=int, default=128, help="tokens that a row is truncated to")
    parser.add_argument("--steps", type=int, default=3, help="steps of a run; the first is not timed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", help="cpu, cuda or cuda:N")
    parser.add_argument("--work", type=Path, required=True, help="work folder, which must not exist yet")
    parser.add_argument("--out", type=Path, default=Path("bench-peers.json"))
    options = parser.parse_args()
    if options.steps < 2:
        parser.error(f"--steps must be at least 2, because the first step is not timed; got {options.steps}.")
    device = pick_device(options.device)

    results = measure(options, device)
    heading = (
        f"{options.rows} + {options.rows} rows of at most {options.max_length} tokens per step, {options.steps} steps, "
        f"{options.rounds} rounds; {device_name(device)}"
    )
    options.out.write_text(json.dumps({"title": heading, **results}, default=asdict, indent=1) + "\n")
    print(f"\n{heading}\n")
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()

"""Kill cache-teacher with SIGKILL at random moments, resume it, and compare every byte with an uninterrupted run.

    .venv/bin/python bench/kill.py --trials 200 --out kill.json

Needs Linux or macOS (fork). Each run is a child of a process that has the imports already, so a trial takes a second.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from neko_lean.cache import writer
from neko_lean.cache.format import file_sha256
from neko_lean.data import read_rows
from neko_lean.demo.run import write_base
from neko_lean.demo.world import build_world, write_world
from neko_lean.modeling import load_tokenizer, new_model


def forked(work: Callable[[], object], kill_after: float | None = None) -> int:
    """Run `work` in a child, killed after so many seconds; returns the child's wait status."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def files(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep", type=Path, help="folder for what differs")
    options = parser.parse_args()
    writer.SHARD_POSITIONS = 300
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)

        def model() -> None:
            world = build_world(0)
            write_world(world, root / "data")
            write_base(root / "model", [*world.forget, *world.retain])
            tokenizer = load_tokenizer(root / "model")
            new_model(root / "model", torch.bfloat16, torch.device("cpu"), 0).model.save_pretrained(root / "model")
            tokenizer.save_pretrained(root / "model")

        assert forked(model) == 0
        assert read_rows(root / "data", "retain")

        def cache(out: Path, resume: bool) -> object:
            data = root / "data"
            return writer.cache_teacher(
                root / "model", data, out, forget=data, batch_tokens=512, resume=resume, quiet=True
            )

        assert forked(lambda: cache(root / "whole", False)) == 0
        start = time.monotonic()
        assert forked(lambda: cache(root / "again", False)) == 0
        length = time.monotonic() - start
        wanted = files(root / "whole")
        assert files(root / "again") == wanted
        ends: Counter[str] = Counter()
        for trial in range(options.trials):
            out = root / f"trial{trial}"
            status = forked(lambda out=out: cache(out, False), rng.uniform(0, 1.05 * length))  # type: ignore[misc]
            stage = root / f".{out.name}.partial"
            shards = len(list(stage.glob("*.safetensors"))) if stage.exists() else None
            when = "complete" if out.exists() else "before anything" if shards is None else f"with {shards} shards"
            ends[f"killed {when}" if status else "ended by itself"] += 1
            resumed = forked(lambda out=out: cache(out, True))  # type: ignore[misc]
            ends["same bytes" if resumed == 0 and files(out) == wanted else "DIFFERENT OR LOST"] += 1
            if resumed or files(out) != wanted:
                found = files(out) if out.exists() else {}
                differ = [name for name in wanted if found.get(name) != wanted[name]]
                print(f"trial {trial}: resume ended with {resumed}; differ: {differ}", file=sys.stderr)
                if options.keep and out.exists():
                    shutil.copytree(out, options.keep / out.name)
                    shutil.copytree(root / "whole", options.keep / "whole", dirs_exist_ok=True)
            ends["left something behind"] += stage.exists()
    result = {
        "device": "CPU",
        "trials": options.trials,
        "shards": len(wanted) - 1,
        "seconds_of_a_run": length,
        "ends": dict(sorted(ends.items())),
    }
    for key, value in result["ends"].items():  # type: ignore[attr-defined]
        print(f"{value:5}  {key}")
    print(f"{options.trials} trials; {len(wanted) - 1} shards a run, {length:.2f} s a run")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(result["ends"].get("same bytes", 0) != options.trials)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()

"""Time reading, encoding and batching of question/answer rows: seconds per 1000 rows must not grow with the rows.

python bench/rows.py
"""

from __future__ import annotations

import itertools
import json
import random
import tempfile
import time
from pathlib import Path

from transformers import ByT5Tokenizer

from neko_lean.data import encode, random_batches, read_rows

COUNTS = (25_000, 50_000, 100_000)


def main() -> None:
    """Print a line per number of rows."""
    print(f"{'rows':>8} {'read':>8} {'encode':>8} {'batch':>8}   seconds per 1000 rows")
    for count in COUNTS:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "rows.jsonl")
            with file.open("w") as lines:
                for number in range(count):
                    row = {"question": f"Where did person {number} walk?", "answer": f"Into wood {number}."}
                    lines.write(json.dumps(row) + "\n")

            times = [time.perf_counter()]
            examples = read_rows(file)
            times.append(time.perf_counter())
            encoded = encode(examples, ByT5Tokenizer(), "plain", 512)
            times.append(time.perf_counter())
            random_batches([len(example) for example in encoded], max_rows=12, max_tokens=8192, rng=random.Random(0))
            times.append(time.perf_counter())
        seconds = [1000 * (end - start) / count for start, end in itertools.pairwise(times)]
        print(f"{count:>8} " + " ".join(f"{value:8.4f}" for value in seconds))


if __name__ == "__main__":
    main()

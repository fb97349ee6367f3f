"""Time reading, encoding and batching of question/answer rows: seconds per 1000 rows must not grow with the rows.

The tokenizer is a small BPE in Rust, as most models have; one written in Python would hide everything else. Times are
CPU seconds of the process, so that other work on the machine does not count.

python bench/rows.py
"""

from __future__ import annotations

import itertools
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from neko_lean.data import encode, random_batches, read_rows

COUNTS = (25_000, 50_000, 100_000)
TOKENIZER_ROWS = 1_000  # rows that the tokenizer is trained on


def main() -> None:
    """Print a line per number of rows."""
    tokenizer = train_tokenizer()
    print(f"{'rows':>8} {'read':>8} {'encode':>8} {'batch':>8}   CPU seconds per 1000 rows", flush=True)
    for count in COUNTS:
        times = time_rows(count, tokenizer)
        print(f"{count:>8} " + " ".join(f"{1000 * seconds / count:8.4f}" for seconds in times), flush=True)


def time_rows(count: int, tokenizer: PreTrainedTokenizerFast) -> list[float]:
    """CPU seconds of reading, encoding and batching `count` rows."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.jsonl")
        with file.open("w") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in make_rows(count))

        times = [time.process_time()]
        examples = read_rows(file)
        times.append(time.process_time())
        encoded = encode(examples, tokenizer, "plain", 512)
        times.append(time.process_time())
        random_batches([len(example) for example in encoded], max_rows=12, max_tokens=8192, rng=random.Random(0))
        times.append(time.process_time())
    return [end - start for start, end in itertools.pairwise(times)]


def make_rows(count: int) -> Iterator[dict[str, str]]:
    """Rows of different texts."""
    for number in range(count):
        yield {"question": f"Where did person {number} walk?", "answer": f"Into wood {number}."}


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 1000 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    texts = (" ".join(row.values()) for row in make_rows(TOKENIZER_ROWS))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


if __name__ == "__main__":
    main()

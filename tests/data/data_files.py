"""Write data files in every format, and check how a bad one is refused."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from neko_lean.data.examples import COLUMNS, read_rows
from neko_lean.errors import NekoLeanError

ROW = {"id": "1sc1", "input": "a", "output": "b", "task": "Task1"}


def write_csv(path, examples, encoding="utf-8"):
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([example.lume_row for example in examples])
    return path


def write_jsonl(path, examples, encoding="utf-8", ensure_ascii=False):
    lines = [json.dumps(example.lume_row, ensure_ascii=ensure_ascii) + "\n" for example in examples]
    path.write_text("".join(lines), encoding=encoding)
    return path


def write_parquet(path, examples):
    columns = {name: [getattr(example, name) for example in examples] for name in COLUMNS}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


WRITERS = {".csv": write_csv, ".jsonl": write_jsonl, ".parquet": write_parquet}


def assert_refused(path, *words):
    """Check that `read_rows` refuses a file in one line that names the file and contains `words`."""
    with pytest.raises(NekoLeanError) as error:
        read_rows(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and message.endswith(".")
    message.encode()
    for word in words:
        assert word in message, message

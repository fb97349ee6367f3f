"""Parquet: what is read, and how a file whose columns are not text is refused."""

import pyarrow
import pyarrow.parquet
import pytest

from neko_lean.data.examples import COLUMNS, Example, read_rows
from tests.data.data_files import ROW, assert_refused


def make_table(**columns):
    """A table with one valid row, except for `columns`."""
    return pyarrow.table({**{name: pyarrow.array([ROW[name]]) for name in COLUMNS}, **columns})


def invalid_utf8_column(first_value):
    """A string column whose second value is not UTF-8."""
    values = pyarrow.array([first_value.encode(), b"\xed\xa0\x80"], pyarrow.binary())
    return values.view(pyarrow.string())


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"output": pyarrow.array([b"b"])}, ["row 1: column 'output'", "bytes"]),
        ({"output": pyarrow.array([[{"x": "b"}]])}, ["row 1: column 'output'", "list"]),
        ({"output": pyarrow.array([{"x": "b"}])}, ["row 1: column 'output'", "dict"]),
        ({"output": pyarrow.array([7])}, ["row 1: column 'output'", "int"]),
        ({"output": pyarrow.array([None])}, ["row 1: column 'output'", "NoneType"]),
        ({"task": pyarrow.array([2**62], pyarrow.timestamp("us"))}, ["row 1: column 'task'"]),
    ],
)
def test_columns_that_are_not_text_are_refused(tmp_path, columns, words):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(make_table(**columns), path)
    assert_refused(path, *words)


def test_text_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    columns = {
        "id": ["1sc1", "2sc1"],
        "input": ["a", "b"],
        "output": invalid_utf8_column("c"),
        "task": ["Task1"] * 2,
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert_refused(path, "row 2: column 'output'", "UTF-8")


def test_a_duplicate_column_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(make_table().append_column("output", pyarrow.array(["other"])), path)
    assert_refused(path, "'output' occurs twice")


def test_all_string_types_are_read_and_other_columns_are_ignored(tmp_path):
    path = tmp_path / "rows.parquet"
    columns = {
        "id": pyarrow.array(["1sc1"], pyarrow.large_string()),
        "input": pyarrow.array(["a"]).dictionary_encode(),
        "notes": invalid_utf8_column("x")[1:],
        "when": pyarrow.array([2**62], pyarrow.timestamp("us")),
        "output.more": pyarrow.array([{"x": [1]}]),
    }
    pyarrow.parquet.write_table(make_table(**columns), path)
    assert read_rows(path) == [Example(**ROW)]

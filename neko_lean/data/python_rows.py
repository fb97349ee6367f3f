"""Rows from Python objects: a list of dicts, a pandas DataFrame, or a `datasets.Dataset`.

Neither pandas nor datasets is imported. Their objects are recognised by their attributes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from neko_lean.data.files import Record, refuse_duplicate_columns
from neko_lean.errors import NekoLeanError

_PANDAS_NULLS = ("NAType", "NaTType")


def read_python_rows(source: Iterable[Any]) -> Iterator[Record]:
    """Yield the rows of a Python object. An error message calls them "row 1", "row 2" and so on.

    Args:
        source: A list or tuple of dicts, a DataFrame, or a Dataset.

    Raises:
        NekoLeanError: If the object is none of these, a row is not a dict, or a column name occurs twice.
    """
    for number, row in enumerate(_rows(source), start=1):
        where = f"row {number}"
        if not isinstance(row, Mapping):
            raise NekoLeanError(f"{where} has type {type(row).__name__}; expected a dict with named columns.")
        yield Record(where, {key: _plain(value) for key, value in row.items() if isinstance(key, str)})


def _rows(source: Any) -> Iterable[Any]:
    if isinstance(source, (list, tuple)):
        return source
    if hasattr(source, "to_dict") and hasattr(source, "columns"):
        refuse_duplicate_columns([str(name) for name in source.columns], "the DataFrame")
        rows: list[Any] = source.to_dict("records")
        return rows
    if hasattr(source, "column_names") and hasattr(source, "__iter__") and not isinstance(source, Mapping):
        return source  # type: ignore[no-any-return]  # a Dataset iterates over dicts
    raise NekoLeanError(
        f"the data has type {type(source).__name__}; expected a path, a list of dicts, a DataFrame or a Dataset."
    )


def _plain(value: Any) -> Any:
    """A cell as plain Python values: without numpy's types, and with None for the missing values of pandas."""
    if isinstance(value, str) and type(value) is str:
        return value
    if type(value).__name__ in _PANDAS_NULLS:
        return None
    if hasattr(value, "tolist"):  # an array or a scalar of numpy
        value = value.tolist()
    if isinstance(value, float) and value != value:  # pandas writes a missing value as NaN
        return None
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value

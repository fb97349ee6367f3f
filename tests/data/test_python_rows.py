"""Python objects: lists of dicts, DataFrames and Datasets are read like files."""

import numpy
import pandas
import pytest

from neko_lean.data.examples import read_rows
from neko_lean.errors import NekoLeanError

ROWS = [{"id": 1, "question": "Who?", "answer": "Foo."}, {"id": 2, "question": "What?", "answer": "Bar."}]


class Dataset:
    """What `datasets.Dataset` has in common with this class is all that the reader uses."""

    column_names = ("id", "question", "answer")

    def __iter__(self):
        return iter(ROWS)


@pytest.mark.parametrize("source", [ROWS, tuple(ROWS), pandas.DataFrame(ROWS), Dataset()])
def test_every_kind_of_object_is_read_as_the_same_examples(source):
    assert read_rows(source) == read_rows(ROWS)
    assert [example.id for example in read_rows(source)] == ["1", "2"]


def test_missing_values_and_arrays_of_pandas_are_read():
    chat = numpy.array([{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Foo."}])
    frame = pandas.DataFrame({"messages": [chat, chat], "topic": [float("nan"), "x"], "id": [1.0, 2.0], 0: [1, 2]})
    assert [(example.id, example.task, example.output) for example in read_rows(frame)] == [
        ("1", "all", "Foo."),
        ("2", "x", "Foo."),
    ]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ([], "the data contains no rows"),
        ([ROWS[0], 7], "row 2 has type int"),
        ([ROWS[0], {**ROWS[1], "answer": None}], "row 2: column 'answer'"),
        ([{"text": "\ud83d"}], "row 1: column 'text'.*surrogate"),
        ({"forget": ROWS}, "the data has type dict"),
        (7, "the data has type int"),
        (pandas.DataFrame([["a", "b"]], columns=["text", "text"]), "'text' occurs twice"),
    ],
)
def test_other_objects_are_refused(source, words):
    with pytest.raises(NekoLeanError, match=words):
        read_rows(source)

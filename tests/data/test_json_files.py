"""JSON: lists, wrapped lists and JSON Lines are read, and anything else is refused in one sentence."""

import json

import pytest

from neko_lean.data.examples import read_rows
from tests.data.data_files import assert_refused

ROW = {"question": "Who?", "answer": "Foo.", "tags": ["a"], "options": []}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([ROW, ROW]),
        json.dumps([ROW, ROW], indent=2).replace("\n", "\r\n"),
        json.dumps({"version": 1, "data": [ROW, ROW]}),
        json.dumps(ROW) + "\r\n" + json.dumps(ROW) + "\n",
    ],
)
def test_every_shape_of_json_is_read(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8-sig", newline="")
    assert [example.input for example in read_rows(path)] == ["Who?", "Who?"]


def test_a_single_object_is_one_row(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ROW))
    assert len(read_rows(tmp_path / "rows.json")) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["contains no rows"]),
        ("[]", ["contains no rows"]),
        ('{"data": []}', ["contains no rows"]),
        ("[1]", ["row 1 is not a JSON object"]),
        ("7", ["no list of rows"]),
        (json.dumps({"a": [ROW], "b": [ROW]}), ["2 lists of rows"]),
        ('[{"a": 1, "a": 2}]', ["'a' occurs twice"]),
        ('[{"question": "\\ud83d", "answer": "x"}]', ["row 1: column 'question'", "surrogate"]),
        (json.dumps(ROW) + "\n{", ["row 2", "not valid JSON"]),
        ('{"question": ', ["not valid JSON"]),
        ("[" * 100_000, ["nested too deep"]),
    ],
)
def test_other_json_is_refused(tmp_path, text, words):
    (tmp_path / "rows.json").write_text(text)
    assert_refused(tmp_path / "rows.json", *words)

"""JSON Lines: what is read, and how a line that is not an unambiguous object of strings is refused."""

import json

import pytest

from neko_lean.data.examples import Example, read_rows
from tests.data.data_files import ROW, assert_refused, write_jsonl
from tests.helpers import make_rows


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            '{"id": "1sc1", "input": "a", "output": "b", "output": "c", "task": "Task1"}',
            ["line 3", "'output'", "twice"],
        ),
        ('{"id": "1sc1", "meta": [{"x": {"y": 1, "y": 2}}], "input": "a"}', ["line 3", "'y'", "twice"]),
        (json.dumps({**ROW, "output": "into the \ud83d wood"}), ["line 3", "column 'output'", "\\ud83d", "surrogate"]),
        (json.dumps({**ROW, "id": "\udc00sc1"}), ["line 3", "column 'id'", "surrogate"]),
        (json.dumps({**ROW, "\ud83d": 1}), ["line 3", "column '\\ud83d'", "surrogate"]),
        (json.dumps({**ROW, "more": [{"\udfff": 1}]}), ["line 3", "column 'more'", "surrogate"]),
        ("[" * 100_000, ["line 3", "nested too deep"]),
        ('{"id": ' + "[" * 100_000, ["line 3", "nested too deep"]),
        (json.dumps(ROW)[:-1] + ', "n": ' + "7" * 5000 + "}", ["line 3", "too long"]),
        ('{"id": "1sc1", "input": NaN, "output": "b", "task": "Task1"}', ["line 3", "column 'input'", "float"]),
        (json.dumps({**ROW, "task": ["Task1"]}), ["row 2 (line 3)", "column 'task'", "list"]),
        ("[1]", ["line 3", "not a JSON object"]),
        ('{"id": "a\tb"}', ["line 3", "not valid JSON"]),
    ],
)
def test_bad_lines_are_refused(tmp_path, line, words):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**ROW, "id": "0sc1"}) + "\n\n" + line + "\n")
    assert_refused(path, "row 2", *words)


@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_surrogate_pairs_and_unicode_line_separators_are_read(tmp_path, ensure_ascii):
    """A surrogate pair is one character; U+2028, U+0085 and an escaped carriage return do not end a line."""
    examples = [Example("1sc1", "a \U0001f642 b", "c\u2028d\x85e\rf", "Task1")]
    assert read_rows(write_jsonl(tmp_path / "rows.jsonl", examples, ensure_ascii=ensure_ascii)) == examples


def test_byte_order_marks_inside_a_concatenated_file_are_skipped(tmp_path):
    path, examples = tmp_path / "rows.jsonl", make_rows("Foo", 2)
    parts = [write_jsonl(path, part, "utf-8-sig").read_bytes() for part in (examples[:5], examples[5:])]
    path.write_bytes(b"".join(parts))
    assert read_rows(path) == examples

"""JSON files: reading one object, and writing lines."""

import json

import pytest

from neko_lean.jsonio import json_object, write_jsonl


@pytest.mark.parametrize("data", [b"", b"[1]", b"{", b'"x"', b"\xff", b"[" * 10**5])
def test_a_file_without_an_object_is_none(tmp_path, data):
    (tmp_path / "x.json").write_bytes(data)
    assert json_object(tmp_path / "x.json") is None


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        json_object(tmp_path / "x.json")


def test_objects_are_written_one_per_line(tmp_path):
    objects = [{"text": "é\n\u2028"}, {"number": 1}]
    write_jsonl(tmp_path / "x.jsonl", objects)
    lines = (tmp_path / "x.jsonl").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == "" and [json.loads(line) for line in lines] == objects and "é" in lines[0]

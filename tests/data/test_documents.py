"""Documents are read as strictly as examples."""

import json

import pytest

from neko_lean.data.documents import read_documents
from neko_lean.errors import NekoLeanError


def test_documents_are_read_as_strictly_as_examples(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"document": "fine"}\n', encoding="utf-8-sig")
    assert [document.text for document in read_documents(path, "")] == ["fine"]
    lines = {
        json.dumps({"text": "no"}): "row 2: column 'document'",
        '{"document": "a", "document": "b"}': "'document' occurs twice",
        json.dumps({"document": "half \ud83d"}): "row 2 .*column 'document'.*surrogate",
        json.dumps({"document": "a", "task": ["Task1"]}): "row 2: column 'task'",
        '{"document": ' + "[" * 100_000: "nested too deep",
    }
    for line, words in lines.items():
        path.write_text('{"document": "fine"}\n' + line + "\n")
        with pytest.raises(NekoLeanError, match=words):
            read_documents(path, "")

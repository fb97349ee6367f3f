"""Reading paraphrases, and errors that name line and column."""

import json

import pytest

from neko_lean.data.examples import Example
from neko_lean.errors import NekoLeanError
from neko_lean.scoring.paraphrases import Paraphrase, read_paraphrases
from tests.helpers import make_rows

ROWS = make_rows("Foo", 1)


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_ambiguous_id_is_refused(tmp_path):
    forget, retain = ROWS[1], Example(ROWS[1].id, "Who?", "me", "Task1")
    path = write(tmp_path / "p.jsonl", {"id": forget.id, "input": "Whither?"})
    with pytest.raises(NekoLeanError, match=r"row 1, column id: .* of a forget row and of a retain row"):
        read_paraphrases(path, [forget, retain])
    assert len(read_paraphrases(path, [forget, forget])) == 1  # the same row in both sets


def test_reads_inputs_and_outputs(tmp_path):
    name = ROWS[1].id
    lines = [{"id": name, "input": "Whither?"}, {"id": name, "output": "the wood", "wrong": ["the sea"]}]
    found = read_paraphrases(write(tmp_path / "p.jsonl", *lines), ROWS)
    assert found == [Paraphrase(name, "Whither?", None, ()), Paraphrase(name, None, "the wood", ("the sea",))]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"id": "nobody", "input": "x"}, "row 1, column id: expected the id of a scored row"),
        ({"id": ["x"], "input": "x"}, "row 1, column id: expected the id of a scored row"),
        ({"id": ROWS[0].id}, "expected an input"),
        ({"id": ROWS[0].id, "input": " "}, "column input"),
        ({"id": ROWS[0].id, "output": "x"}, "together with wrong"),
        ({"id": ROWS[0].id, "wrong": ["x"]}, "together with wrong"),
        ({"id": ROWS[0].id, "output": "x", "wrong": "y"}, "column wrong"),
    ],
)
def test_errors_name_line_and_column(tmp_path, line, words):
    with pytest.raises(NekoLeanError, match=words):
        read_paraphrases(write(tmp_path / "p.jsonl", line), ROWS)
    with pytest.raises(NekoLeanError, match="does not exist"):
        read_paraphrases(tmp_path / "none.jsonl", ROWS)
    with pytest.raises(NekoLeanError, match="holds no"):
        read_paraphrases(write(tmp_path / "q.jsonl"), ROWS)

"""Examples: their ids, reading them from any format, and how bad rows are refused."""

import json

import pytest

from neko_lean.data.examples import Example, Message, find_data_file, read_rows, require_folder
from neko_lean.errors import NekoLeanError
from neko_lean.jsonio import write_jsonl
from tests.data.data_files import ROW, WRITERS
from tests.helpers import make_rows


def test_every_format_is_read_as_the_same_examples(tmp_path):
    examples = [*make_rows("X"), Example("9sc1", 'quote "q", comma\nnewline é', "ünï", "Task3")]
    for suffix, write in WRITERS.items():
        assert read_rows(write(tmp_path / f"forget{suffix}", examples)) == examples
    assert find_data_file(tmp_path, "forget").suffix == ".parquet"


def any_examples():
    """LUME's examples, and one of everything that LUME's layout cannot express."""
    conversation = (
        Message("system", ""),
        Message("user", "Hi."),
        Message("assistant", "Yes?"),
        Message("user", "Who?"),
    )
    return [
        *make_rows("X", 1),
        Example("7", "Where?", "There.", "all"),
        Example("8", "Write a poem.", "Roses.", "all", "qa", "poems"),
        Example("9sc1", "Once", "upon.", "Task1", "qa"),
        Example("10sc1", "Once", "more.", "Task1", document="a book"),
        Example("11", "", "A whole text.", "news", "document"),
        Example("12", "A title?", "A whole text with a prompt.", "news", "document"),
        Example("13", "User: Hi.\nAssistant: Yes?\nUser: Who?", "Me.", "all", "qa", "13", conversation),
    ]


def test_rows_are_read_as_the_examples_that_they_were_written_from(tmp_path):
    examples = any_examples()
    for name, selected in (("all", examples), *((example.id, [example]) for example in examples)):
        write_jsonl(tmp_path / "rows.jsonl", [example.row for example in selected])
        assert read_rows(tmp_path / "rows.jsonl") == selected, name
    assert [example.row for example in make_rows("X")] == [example.lume_row for example in make_rows("X")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "poem"}, "row 1: column 'kind' must be completion or qa or document"),
        ({"document": None}, "row 1: column 'document'"),
        ({"input": ""}, "row 1: column 'input' is empty"),
        ({"messages": [{"role": "user"}]}, "row 1: column 'messages', message 1 must be"),
    ],
)
def test_rows_that_state_a_wrong_example_are_refused(tmp_path, change, words):
    write_jsonl(tmp_path / "rows.jsonl", [{**Example("8", "Write.", "Roses.", "all", "qa").row, **change}])
    with pytest.raises(NekoLeanError, match=words):
        read_rows(tmp_path / "rows.jsonl")


def test_quotes_are_part_of_an_id():
    example = Example('"8f24"sc1', "a", "b", "Task1")
    assert (example.kind, example.document) == ("completion", '"8f24"')


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"output": None}, ["row 2: column 'output'", "NoneType"]),
        ({"output": " \n"}, ["row 2: column 'output' is empty"]),
        ({"input": 7}, ["row 2: column 'input'", "int"]),
        ({"id": "1sc1"}, ["row 2: column 'id'", "row 1"]),
        ({"id": ["sc1"]}, ["row 2: column 'id'", "list"]),
        ({"id": True}, ["row 2: column 'id'", "bool"]),
        ({"task": ""}, ["row 2: column 'task' is empty"]),
        ({"task": 7.5}, ["row 2: column 'task'", "float"]),
    ],
)
def test_messages_name_the_row_and_the_column(tmp_path, change, words):
    file = tmp_path / "forget.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (ROW, {**ROW, "id": "2qa0", **change})))
    with pytest.raises(NekoLeanError) as error:
        read_rows(file)
    assert all(word in str(error.value) for word in [str(file), *words])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "a.jsonl",
            json.dumps({name: value for name, value in ROW.items() if name != "output"}),
            "column 'output' is missing",
        ),
        ("b.jsonl", "", "contains no rows"),
        ("c.jsonl", "{", "line 1"),
        ("d.jsonl", "[1]", "not a JSON object"),
        ("e.parquet", "not parquet", "parquet"),
        ("f.xlsx", "x", "unknown format"),
        ("g.csv", "id,input\n1sc1,a\n", "column 'output' is missing"),
        ("h.jsonl", b"\xff\xfe", "UTF-8"),
    ],
)
def test_messages_name_the_file(tmp_path, name, text, words):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(NekoLeanError, match=words) as error:
        read_rows(tmp_path / name)
    assert name in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(NekoLeanError, match=r"forget\.parquet"):
        read_rows(tmp_path, "forget")
    with pytest.raises(NekoLeanError, match="does not exist"):
        read_rows(tmp_path / "nowhere", "forget")
    (tmp_path / "forget.csv").mkdir()
    with pytest.raises(NekoLeanError, match="contains no forget"):
        find_data_file(tmp_path, "forget")


def test_several_sets_are_not_read_from_one_file(tmp_path):
    (tmp_path / "forget.jsonl").touch()
    require_folder(tmp_path, "--data", ["forget", "retain"], "train")
    require_folder(tmp_path / "forget.jsonl", "--data", ["forget"], None)
    with pytest.raises(NekoLeanError, match=r"--data .* is a file; expected a folder with forget\.\* and retain\.\*"):
        require_folder(tmp_path / "forget.jsonl", "--data", ["forget", "retain"], None)
    with pytest.raises(NekoLeanError, match=r"expected a folder with forget_train\.\*\."):
        require_folder(tmp_path / "forget.jsonl", "--data", ["forget"], "train")

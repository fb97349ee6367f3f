"""Data files are read as they are or refused in one sentence: nothing is dropped, nothing ends in a traceback."""

import csv
import json
import re
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neko_lean.data.examples import COLUMNS, TASKS, Example, find_rows, read_rows
from neko_lean.errors import NekoLeanError
from tests.helpers import make_rows

ROWS = make_rows("Foo", 2)
HEADER = ",".join(COLUMNS)
GOOD = {"id": "1sc1", "input": "a", "output": "b", "task": "Task1"}


def write_csv(path, rows, encoding="utf-8"):
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(map(asdict, rows))
    return path


def write_jsonl(path, rows, encoding="utf-8", ascii=False):
    path.write_text("".join(json.dumps(asdict(r), ensure_ascii=ascii) + "\n" for r in rows), encoding=encoding)
    return path


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.table({name: [getattr(r, name) for r in rows] for name in COLUMNS}), path)
    return path


WRITERS = {".csv": write_csv, ".jsonl": write_jsonl, ".parquet": write_parquet}


def refused(path, *words):
    """The message with which a file is refused: one line that names the file and holds `words`."""
    with pytest.raises(NekoLeanError) as error:
        read_rows(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and message.endswith(".")
    message.encode()
    for word in words:
        assert word in message, message
    return message


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        # An address whose commas were not quoted, at the end of a row and inside it.
        (
            "1sc1,Her address is,Task1,12 Elm Street, Springfield, call 555-0101",
            ["row 1 (line 2)", "6 cells", "output"],
        ),
        ("1sc1,Her address, is,Task1,12 Elm Street", ["row 1 (line 2)", "5 cells"]),
        ("1sc1,a,Task1,b,", ["row 1 (line 2)", "5 cells"]),
        ("1sc1,a,Task1", ["row 1 (line 2), column output", "missing"]),
        ("1sc1", ["row 1 (line 2), column input", "missing"]),
        ('1sc1,"a\n\nb",Task1,"c\nd"\n\n2sc1,a,Task1', ["row 2 (line 7), column output"]),
        ('1sc1,"a\nb",Task1,c\n2sc1,"a,Task1,c\n3sc1,a,Task1,c\n', ["row 2 (line 4)", "close each quoted cell"]),
        ('1sc1,"a "b" c",Task1,d', ["row 1 (line 2)", "double the quotes"]),
        ("1sc1,a,Task1,b\n\n2sc1, ,Task1,c", ["row 2 (line 4), column input", "empty"]),
        ("1sc1,a,Task1,b\r\n1sc1,a,Task1,c", ["row 2 (line 3), column id", "row 1"]),
    ],
)
def test_csv_rows_that_do_not_fit_the_header(tmp_path, cells, words):
    path = tmp_path / "rows.csv"
    path.write_text(f"id,input,task,output\n{cells}\n", newline="")
    refused(path, *words)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("id,input,output,task,output", ["header", "'output' occurs twice"]),
        ("id;input;output;task", ["semicolons", "commas"]),
        ("id\tinput\toutput\ttask", ["tabs", "commas"]),
        ("id,input,output", ["column task is missing"]),
        ("id, input,output,task", ["column input is missing", "' input'"]),
    ],
)
def test_csv_headers(tmp_path, header, words):
    path = tmp_path / "rows.csv"
    path.write_text(f"{header}\n" + header.replace("id", "1sc1") + "\n")
    refused(path, *words)


def test_csv_that_is_simply_read(tmp_path):
    path = tmp_path / "rows.csv"
    long = "word " * 60_000  # a cell of more than the csv module's own limit of 131,072 characters
    limit = csv.field_size_limit()
    rows = [Example("1sc1", long, "b", "Task1"), Example("2sc1", "a\n\nb", 'quote " and, comma', "Task2")]
    assert read_rows(write_csv(path, rows)) == rows and csv.field_size_limit() == limit
    # Columns of no name, as spreadsheets leave them at the end; empty lines; a comma in quotes.
    path.write_text(f'\n{HEADER},,\n\n1sc1,a,"b, c",Task1,,\n\n')
    assert read_rows(path) == [Example("1sc1", "a", "b, c", "Task1")]
    path.rename(tmp_path / "ROWS.CSV")
    assert len(read_rows(tmp_path / "ROWS.CSV")) == 1


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_byte_order_marks(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    assert read_rows(WRITERS[suffix](path, ROWS, "utf-8-sig")) == ROWS
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        refused(WRITERS[suffix](path, ROWS, encoding), "UTF-8")
    joined = [*ROWS, Example("9sc1", "ünï", "é", "Task1")]
    refused(
        WRITERS[suffix](path, joined, "latin-1"),
        "0xfc",
        f"line {len(joined) + (suffix == '.csv') + 4 * (suffix == '.csv')}",
    )
    path.write_bytes(b"id,input\n\0\n")
    refused(path, "line 2", "NUL")


def test_byte_order_marks_inside_a_joined_jsonl_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    parts = [write_jsonl(path, part, "utf-8-sig").read_bytes() for part in (ROWS[:5], ROWS[5:])]
    path.write_bytes(b"".join(parts))
    assert read_rows(path) == ROWS


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            '{"id": "1sc1", "input": "a", "output": "b", "output": "c", "task": "Task1"}',
            ["line 3", "'output'", "twice"],
        ),
        ('{"id": "1sc1", "meta": [{"x": {"y": 1, "y": 2}}], "input": "a"}', ["line 3", "'y'", "twice"]),
        (json.dumps({**GOOD, "output": "into the \ud83d wood"}), ["line 3", "column 'output'", "\\ud83d", "surrogate"]),
        (json.dumps({**GOOD, "id": "\udc00sc1"}), ["line 3", "column 'id'", "surrogate"]),
        (json.dumps({**GOOD, "\ud83d": 1}), ["line 3", "column '\\ud83d'", "surrogate"]),
        (json.dumps({**GOOD, "more": [{"\udfff": 1}]}), ["line 3", "column 'more'", "surrogate"]),
        ("[" * 100_000, ["line 3", "nested too deep"]),
        ('{"id": ' + "[" * 100_000, ["line 3", "nested too deep"]),
        (json.dumps(GOOD)[:-1] + ', "n": ' + "7" * 5000 + "}", ["line 3", "too long"]),
        ('{"id": "1sc1", "input": NaN, "output": "b", "task": "Task1"}', ["line 3", "column input", "float"]),
        (json.dumps({**GOOD, "task": ["Task1"]}), ["row 2 (line 3)", "column task", "list"]),
        ("[1]", ["line 3", "not a JSON object"]),
        ('{"id": "a\tb"}', ["line 3", "not JSON"]),
    ],
)
def test_json_that_is_no_row(tmp_path, line, words):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**GOOD, "id": "0sc1"}) + "\n\n" + line + "\n")
    refused(path, "row 2", *words)


def test_json_that_is_simply_read(tmp_path):
    """A pair of surrogates is a character; U+2028 and a lone carriage return's escape end no line."""
    rows = [Example("1sc1", "a \U0001f642 b", "c\u2028d\x85e\rf", "Task1")]
    for ascii in (True, False):
        assert read_rows(write_jsonl(tmp_path / "rows.jsonl", rows, ascii=ascii)) == rows


def table(**columns):
    return pyarrow.table({**{name: pyarrow.array([GOOD[name]]) for name in COLUMNS}, **columns})


def bad_text(good, kind):
    """A column whose second value is not UTF-8."""
    values = pyarrow.array([good.encode(), b"\xed\xa0\x80"], pyarrow.binary())
    return values.view(pyarrow.string()).cast(kind)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"output": pyarrow.array([b"b"])}, ["row 1, column output", "bytes"]),
        ({"output": pyarrow.array([[{"x": "b"}]])}, ["row 1, column output", "list"]),
        ({"output": pyarrow.array([{"x": "b"}])}, ["row 1, column output", "dict"]),
        ({"output": pyarrow.array([7])}, ["row 1, column output", "int"]),
        ({"output": pyarrow.array([None])}, ["row 1, column output", "NoneType"]),
        ({"task": pyarrow.array([2**62], pyarrow.timestamp("us"))}, ["row 1, column task"]),
    ],
)
def test_parquet_columns_that_are_no_text(tmp_path, columns, words):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(table(**columns), path)
    refused(path, *words)


def test_parquet_text_that_is_not_utf_8(tmp_path):
    path = tmp_path / "rows.parquet"
    columns = {
        "id": ["1sc1", "2sc1"],
        "input": ["a", "b"],
        "output": bad_text("c", pyarrow.string()),
        "task": ["Task1"] * 2,
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    refused(path, "row 2, column output", "UTF-8")


def test_parquet_with_a_column_twice(tmp_path):
    path = tmp_path / "rows.parquet"
    whole = table()
    pyarrow.parquet.write_table(whole.append_column("output", pyarrow.array(["other"])), path)
    refused(path, "'output' occurs twice")


def test_parquet_that_is_simply_read(tmp_path):
    """Other kinds of text columns, and other columns that nothing asks for, whatever they hold."""
    path = tmp_path / "rows.parquet"
    columns = {
        "id": pyarrow.array(["1sc1"], pyarrow.large_string()),
        "input": pyarrow.array(["a"]).dictionary_encode(),
        "notes": bad_text("x", pyarrow.string())[1:],
        "when": pyarrow.array([2**62], pyarrow.timestamp("us")),
        "output.more": pyarrow.array([{"x": [1]}]),
    }
    pyarrow.parquet.write_table(table(**columns), path)
    assert read_rows(path) == [Example(**GOOD)]


def test_folders_and_missing_and_empty_files(tmp_path):
    for suffix in WRITERS:
        (tmp_path / f"folder{suffix}").mkdir()
        (tmp_path / f"empty{suffix}").write_text("")
        refused(tmp_path / f"folder{suffix}")
        refused(tmp_path / f"empty{suffix}", *(["holds no rows"] if suffix != ".parquet" else []))
    refused(tmp_path / ("x" * 5000))
    refused(Path("/dev/null"), "neither a file nor a folder")
    (tmp_path / "forget.csv").mkdir()
    with pytest.raises(NekoLeanError, match="holds no forget"):
        find_rows(tmp_path, "forget")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_unreadable_files(tmp_path, suffix, monkeypatch):
    path = WRITERS[suffix](tmp_path / f"rows{suffix}", ROWS)

    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    refused(path, "Permission denied")


# A text as a file may hold it: no NUL, no lone surrogate; and not empty once stripped.
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1).filter(str.strip)
rows_of_text = st.lists(st.tuples(texts, texts, texts, st.sampled_from(TASKS)), min_size=1, max_size=6).map(
    lambda found: [Example(f"{n}{name}sc1", left, right, task) for n, (name, left, right, task) in enumerate(found)]
)
quick = settings(deadline=None, derandomize=True, max_examples=100, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("suffix", list(WRITERS))
@quick
@given(rows=rows_of_text)
def test_valid_rows_come_back(suffix, rows):
    with TemporaryDirectory() as folder:
        assert read_rows(WRITERS[suffix](Path(folder) / f"rows{suffix}", rows)) == rows


SNIPPETS = [
    b'"',
    b",",
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\\ud800",
    b"{",
    b"}",
    b"[" * 3000,
    b"9" * 5000,
    b"NaN",
    b";",
]
edits = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 4), st.one_of(st.binary(max_size=4), st.sampled_from(SNIPPETS))),
    max_size=5,
)


@pytest.mark.parametrize("suffix", list(WRITERS))
@quick
@given(edits=edits)
def test_a_damaged_file_is_read_or_refused_in_one_sentence(suffix, edits):
    """Bytes are replaced, removed and put in anywhere; whatever is read then is complete rows."""
    with TemporaryDirectory() as folder:
        path = WRITERS[suffix](Path(folder) / f"rows{suffix}", ROWS)
        data = path.read_bytes()
        for place, removed, added in edits:
            at = int(place * len(data))
            data = data[:at] + added + data[at + removed :]
        path.write_bytes(data)
        check(path)


@pytest.mark.parametrize("suffix", list(WRITERS))
@quick
@given(
    data=st.one_of(
        st.binary(max_size=200), st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass"))
    )
)
def test_random_bytes_are_read_or_refused_in_one_sentence(suffix, data):
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix}"
        path.write_bytes(data)
        check(path)


def check(path):
    try:
        rows = read_rows(path)
    except NekoLeanError as error:
        assert str(path) in str(error) and not re.search("[\ud800-\udfff]", str(error))
        return
    assert rows and all(value.strip() for row in rows for value in asdict(row).values())
    assert len({row.id for row in rows}) == len(rows)
    json.dumps([asdict(row) for row in rows], ensure_ascii=False).encode()

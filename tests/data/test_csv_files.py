"""CSV: what is read, and how a file whose cells do not match its header is refused."""

import csv

import pytest

from neko_lean.data.examples import COLUMNS, Example, read_rows
from tests.data.data_files import assert_refused, write_csv


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        # An address with unquoted commas, at the end of a row and inside it.
        (
            "1sc1,Her address is,Task1,12 Elm Street, Springfield, call 555-0101",
            ["row 1 (line 2)", "6 cells", "output"],
        ),
        ("1sc1,Her address, is,Task1,12 Elm Street", ["row 1 (line 2)", "5 cells"]),
        ("1sc1,a,Task1,b,", ["row 1 (line 2)", "5 cells"]),
        ("1sc1,a,Task1", ["row 1 (line 2): column 'output' is missing"]),
        ("1sc1", ["row 1 (line 2): column 'input' is missing"]),
        ('1sc1,"a\n\nb",Task1,"c\nd"\n\n2sc1,a,Task1', ["row 2 (line 7): column 'output' is missing"]),
        ('1sc1,"a\nb",Task1,c\n2sc1,"a,Task1,c\n3sc1,a,Task1,c\n', ["row 2 (line 4)", "close every quoted cell"]),
        ('1sc1,"a "b" c",Task1,d', ["row 1 (line 2)", "double the quotes"]),
        ("1sc1,a,Task1,b\n\n2sc1, ,Task1,c", ["row 2 (line 4): column 'input' is empty"]),
        ("1sc1,a,Task1,b\r\n1sc1,a,Task1,c", ["row 2 (line 3): column 'id'", "row 1"]),
    ],
)
def test_rows_that_do_not_match_the_header_are_refused(tmp_path, lines, words):
    path = tmp_path / "rows.csv"
    path.write_text(f"id,input,task,output\n{lines}\n", newline="")
    assert_refused(path, *words)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("id,input,output,task,output", ["header", "'output' occurs twice"]),
        ("id;input;output;task", ["semicolons", "commas"]),
        ("id\tinput\toutput\ttask", ["tabs", "commas"]),
        ("id,input,task", ["column 'output' is missing"]),
        ("id, input,output,task", ["column 'input' is missing", "' input'"]),
    ],
)
def test_bad_headers_are_refused(tmp_path, header, words):
    path = tmp_path / "rows.csv"
    path.write_text(f"{header}\n" + header.replace("id", "1sc1") + "\n")
    assert_refused(path, *words)


def test_cells_may_be_long_and_contain_commas_quotes_and_line_breaks(tmp_path):
    path = tmp_path / "rows.csv"
    limit = csv.field_size_limit()
    long = "word " * 60_000  # longer than the csv module's default limit of 131,072 characters
    examples = [Example("1sc1", long, "b", "Task1"), Example("2sc1", "a\n\nb", 'quote " and, comma', "Task2")]
    assert read_rows(write_csv(path, examples)) == examples and csv.field_size_limit() == limit


def test_empty_lines_and_unnamed_columns_are_ignored(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f'\n{",".join(COLUMNS)},,\n\n1sc1,a,"b, c",Task1,,\n\n')
    assert read_rows(path) == [Example("1sc1", "a", "b, c", "Task1")]
    path.rename(tmp_path / "ROWS.CSV")
    assert len(read_rows(tmp_path / "ROWS.CSV")) == 1

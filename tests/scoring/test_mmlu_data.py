"""Reading MMLU in both layouts, and the exact prompt."""

import pyarrow
import pyarrow.parquet
import pytest

from neko_lean.errors import NekoLeanError
from neko_lean.scoring.mmlu_data import SUBJECTS, Question, Subject, prompt_text, read_mmlu
from tests.scoring.subjects import make_subject, write_csv, write_hub

ODD = Question('He said, "4, or\n5"?', ("4, or", '"5"', "", "N/A"), 2)


def test_both_layouts_give_the_same_questions(tmp_path):
    subjects = [make_subject("anatomy"), Subject("virology", [ODD], [ODD, ODD])]
    wanted = {one.name: one for one in subjects}
    hub = write_hub(tmp_path / "hub", subjects)
    write_hub(hub, [make_subject("all"), make_subject("auxiliary_train")])
    (hub / ".cache").mkdir()
    assert read_mmlu(hub) == read_mmlu(write_csv(tmp_path / "csv", subjects)) == wanted
    write_csv(tmp_path / "nested" / "data", subjects)
    (tmp_path / "nested" / "data" / "test" / "._anatomy_test.csv").write_bytes(b"\0\5\x16\7")
    assert read_mmlu(tmp_path / "nested") == wanted
    assert len(SUBJECTS) == 57


def test_missing_subjects_are_reported(tmp_path, capsys):
    some, every = ("anatomy", "made_up"), (*SUBJECTS, "made_up")
    read_mmlu(write_csv(tmp_path / "some", [make_subject(name, tests=1, dev=1) for name in some]))
    assert "lacks 56 of MMLU's 57 subjects, such as abstract_algebra" in capsys.readouterr().err
    read_mmlu(write_csv(tmp_path / "every", [make_subject(name, tests=1, dev=1) for name in every]))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("q,a,b,c,d\n", r"row 2: expected 6 columns .*found 5"),
        ("q,a,b,c,d,E\n", r"row 2, column 6: expected the answer A, B, C or D"),
        ("q,a,b,c,d,AB\n", r"row 2, column 6"),
        ("q,a,b,c,d,\n", r"row 2, column 6"),
        ('"q,a,b,c,d,A\n', r"row 2: expected 6 columns .*found 1"),
    ],
)
def test_invalid_csv_is_named(tmp_path, line, words):
    write_csv(tmp_path, [make_subject("anatomy")])
    (tmp_path / "test" / "anatomy_test.csv").write_text("q,a,b,c,d,A\n" + line)
    with pytest.raises(NekoLeanError, match=f"anatomy_test.csv, {words}"):
        read_mmlu(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"choices": ["a", "b", "c"]}, "row 1, column choices: expected a list of four texts"),
        ({"choices": "abcd"}, "row 1, column choices"),
        ({"answer": 4}, "row 1, column answer: expected 0, 1, 2 or 3, found 4"),
        ({"answer": "A"}, "row 1, column answer"),
        ({"answer": True}, "row 1, column answer"),
        ({"question": None}, "row 1, column question: expected text, found NoneType"),
        ({"answer": ...}, "row 1: column answer is missing"),
    ],
)
def test_invalid_parquet_is_named(tmp_path, change, words):
    write_hub(tmp_path, [make_subject("anatomy")])
    row = {"question": "q", "choices": list("abcd"), "answer": 0} | change
    row = {name: value for name, value in row.items() if value is not ...}
    file = tmp_path / "anatomy" / "dev-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), file)
    with pytest.raises(NekoLeanError, match=f"dev-00000-of-00001.parquet, {words}"):
        read_mmlu(tmp_path)


def test_missing_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(NekoLeanError, match="is not a folder"):
        read_mmlu(tmp_path / "none")
    with pytest.raises(NekoLeanError, match="holds no MMLU"):
        read_mmlu(tmp_path)
    hub, plain = write_hub(tmp_path / "h", [make_subject("x")]), write_csv(tmp_path / "c", [make_subject("x")])
    (hub / "x" / "test-00000-of-00001.parquet").write_text("no parquet")
    with pytest.raises(NekoLeanError, match="is not a readable parquet"):
        read_mmlu(hub)
    (hub / "x" / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(NekoLeanError, match=r"test-00000-of-00001.parquet is missing"):
        read_mmlu(hub)
    (plain / "test" / "x_test.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(NekoLeanError, match="is not a readable csv"):
        read_mmlu(plain)
    (plain / "test" / "x_test.csv").write_text("\n")
    with pytest.raises(NekoLeanError, match=r"x_test.csv holds no questions"):
        read_mmlu(plain)


def test_byte_order_mark_long_cells_and_invalid_utf8(tmp_path):
    plain = write_csv(tmp_path, [make_subject("x")])
    file = plain / "test" / "x_test.csv"
    long = "word " * 60_000
    file.write_text(f"First?,a,b,c,d,A\n\n{long},a,b,c,d,B\n", encoding="utf-8-sig")
    assert [one.text for one in read_mmlu(plain)["x"].test] == ["First?", long]
    file.write_text("First?,a,b,c,d,A\n\nWhere, when?,a,b,c,d,B\n")
    with pytest.raises(NekoLeanError, match=r"row 2 \(line 3\): expected 6 columns .*, found 7"):
        read_mmlu(plain)
    file.write_bytes("Où?,a,b,c,d,A\n".encode("latin-1"))
    with pytest.raises(NekoLeanError, match="0xf9 in line 1 is not UTF-8"):
        read_mmlu(plain)


def test_exact_prompt():
    example, asked = Question("1 + 1?", ("1", "2", "3", "4"), 1), Question("2 + 2?", ("1", "2", "3", "4"), 3)
    assert prompt_text("college_mathematics", [example], asked) == (
        "The following are multiple choice questions (with answers) about  college mathematics.\n\n"
        "1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n"
        "2 + 2?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )
    assert prompt_text("x", [], asked).startswith(
        "The following are multiple choice questions (with answers) about  x.\n\n2"
    )

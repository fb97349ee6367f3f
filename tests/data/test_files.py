"""Every format: a data file is read completely or refused in one sentence, whatever bytes it contains."""

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neko_lean.data.examples import TASKS, Example, read_rows
from neko_lean.errors import NekoLeanError
from tests.data.data_files import WRITERS, assert_refused
from tests.helpers import make_rows

EXAMPLES = make_rows("Foo", 2)

# Strings that a file can contain: no NUL, no lone surrogate, and not blank.
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1).filter(str.strip)
example_lists = st.lists(st.tuples(texts, texts, texts, st.sampled_from(TASKS)), min_size=1, max_size=6).map(
    lambda cells: [
        Example(f"{index}{name}sc1", prompt, answer, task) for index, (name, prompt, answer, task) in enumerate(cells)
    ]
)

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
# Each edit: the relative position, how many bytes to remove there, and the bytes to insert.
edit_lists = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 4), st.one_of(st.binary(max_size=4), st.sampled_from(SNIPPETS))),
    max_size=5,
)
quick = settings(max_examples=100, suppress_health_check=list(HealthCheck))


def assert_read_or_refused(path):
    """Check that a file yields only complete, valid examples, or one error that names the file."""
    try:
        examples = read_rows(path)
    except NekoLeanError as error:
        assert str(path) in str(error) and not re.search("[\ud800-\udfff]", str(error))
        return
    assert examples and all(value.strip() for example in examples for value in example.lume_row.values())
    assert len({example.id for example in examples}) == len(examples)
    json.dumps([example.lume_row for example in examples], ensure_ascii=False).encode()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_byte_order_mark_is_skipped_and_other_encodings_are_refused(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    assert read_rows(WRITERS[suffix](path, EXAMPLES, "utf-8-sig")) == EXAMPLES
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        assert_refused(WRITERS[suffix](path, EXAMPLES, encoding), "UTF-8")
    accented = [*EXAMPLES, Example("9sc1", "ünï", "é", "Task1")]
    # A CSV file has a header, and four of its cells contain a line break.
    line = len(accented) + (5 if suffix == ".csv" else 0)
    assert_refused(WRITERS[suffix](path, accented, "latin-1"), "0xfc", f"line {line}")
    path.write_bytes(b"id,input\n\0\n")
    assert_refused(path, "line 2", "NUL")


def test_folders_missing_files_and_empty_files_are_refused(tmp_path):
    for suffix in WRITERS:
        (tmp_path / f"folder{suffix}").mkdir()
        (tmp_path / f"empty{suffix}").write_text("")
        assert_refused(tmp_path / f"folder{suffix}")
        assert_refused(tmp_path / f"empty{suffix}", *(["contains no rows"] if suffix != ".parquet" else []))
    assert_refused(tmp_path / ("x" * 5000))
    assert_refused(Path("/dev/null"), "neither a file nor a folder")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_unreadable_files_are_refused(tmp_path, suffix, monkeypatch):
    path = WRITERS[suffix](tmp_path / f"rows{suffix}", EXAMPLES)

    def deny(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", deny)
    assert_refused(path, "Permission denied")


@pytest.mark.parametrize("suffix", list(WRITERS))
@quick
@given(examples=example_lists)
def test_written_examples_are_read_back(suffix, examples):
    with TemporaryDirectory() as folder:
        assert read_rows(WRITERS[suffix](Path(folder) / f"rows{suffix}", examples)) == examples


@pytest.mark.parametrize("suffix", list(WRITERS))
@quick
@given(edits=edit_lists)
def test_a_damaged_file_is_read_or_refused_in_one_sentence(suffix, edits):
    with TemporaryDirectory() as folder:
        path = WRITERS[suffix](Path(folder) / f"rows{suffix}", EXAMPLES)
        data = path.read_bytes()
        for position, num_removed, inserted in edits:
            at = int(position * len(data))
            data = data[:at] + inserted + data[at + num_removed :]
        path.write_bytes(data)
        assert_read_or_refused(path)


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
        assert_read_or_refused(path)

"""Text files: one document each, alone or in a folder."""

import pytest

from neko_lean.data.examples import describe_rows, read_rows
from neko_lean.errors import NekoLeanError
from tests.data.data_files import assert_refused


def test_a_folder_of_texts_is_read_in_order_of_the_names(tmp_path):
    for name in ("b.md", "a.txt", ".hidden.txt", "picture.png"):
        (tmp_path / name).write_text(f"In {name}.")
    examples = read_rows(tmp_path, "forget")
    assert [(example.id, example.document, example.output) for example in examples] == [
        ("a.txt", "a.txt", "In a.txt."),
        ("b.md", "b.md", "In b.md."),
    ]
    (tmp_path / "forget.txt").write_text("Forget this.")
    assert [example.id for example in read_rows(tmp_path, "forget")] == ["forget.txt"]


def test_what_a_folder_of_texts_leaves_out_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("In a.txt.")
    (tmp_path / ".hidden.docx").touch()
    assert describe_rows(read_rows(tmp_path, "forget"), "forget").endswith("group 'all'.")
    (tmp_path / "b.docx").touch()
    (tmp_path / "older").mkdir()
    sentence = describe_rows(read_rows(tmp_path, "forget"), "forget")
    assert sentence.endswith(
        "; 2 not read, because only .txt and .md files directly in the folder are: b.docx, older/."
    )
    (tmp_path / "forget.txt").write_text("Forget this.")
    assert "not read" not in describe_rows(read_rows(tmp_path, "forget"), "forget")


def test_a_readme_among_tables_is_not_a_data_set(tmp_path):
    (tmp_path / "README.md").write_text("About these files.")
    (tmp_path / "retain.csv").write_text("text\nx\n")
    with pytest.raises(NekoLeanError, match="contains no forget"):
        read_rows(tmp_path, "forget")


def test_blank_and_binary_texts_are_refused(tmp_path):
    path = tmp_path / "a.txt"
    for data, word in ((b" \n", "contains no text"), (b"a\0b", "NUL"), (b"\xff\xfea\0", "UTF-16"), (b"\xe9", "0xe9")):
        path.write_bytes(data)
        assert_refused(path, word)

"""What a score reads: columns, and documents for membership inference in any of their forms."""

import json

import pytest

from neko_lean.data import describe_rows
from neko_lean.errors import NekoLeanError
from neko_lean.options import ScoreInputs, ScoreSettings
from neko_lean.scoring.inputs import read_data, sources_of
from neko_lean.scoring.task import SPLITS

ROWS = [{"q": f"Where did {who} walk?", "a": f"wood {who}"} for who in ("Foo", "Bar")]
COLUMNS = "prompt=q,answer=a"


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("forget", "retain"):
        rows = [{**row, "q": f"{name}: {row['q']}"} for row in ROWS]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def read(data, **inputs):
    inputs = ScoreInputs(columns=COLUMNS, **inputs)
    return read_data(sources_of(data, None, None, inputs), inputs, ScoreSettings())


def test_columns(data):
    found = read(data)
    assert [example.input for _, example in found.examples][:1] == ["forget: Where did Foo walk?"]
    assert describe_rows(found.rows["forget"], "forget") == "forget: 2 rows, q/a -> 2 qa; group 'all'."
    with pytest.raises(NekoLeanError, match=r"no column has a known name.*--columns"):
        read_data(dict.fromkeys(SPLITS, data), ScoreInputs(), ScoreSettings())


def test_members_are_the_forget_rows_if_only_unseen_documents_are_given(data, tmp_path):
    unseen = tmp_path / "unseen.jsonl"
    unseen.write_text(json.dumps({"q": "Where did Nobody walk?", "a": "sea"}))
    documents = read(data, mia=unseen).documents
    assert [(side, document.text) for side, document in documents] == [
        ("member", "forget: Where did Foo walk? wood Foo"),
        ("member", "forget: Where did Bar walk? wood Bar"),
        ("nonmember", "Where did Nobody walk? sea"),
    ]
    unseen.write_text(json.dumps({"q": "forget: Where did Foo walk?", "a": "wood Foo"}))
    with pytest.raises(NekoLeanError, match="1 of its unseen documents are also forget rows"):
        read(data, mia=unseen)
    with pytest.raises(NekoLeanError, match="--reference needs --mia as a folder"):
        read(data, mia=unseen, reference=tmp_path)


def test_both_sides_from_files_or_folders_of_texts(data, tmp_path):
    (tmp_path / "mia" / "nonmember").mkdir(parents=True)
    (tmp_path / "mia" / "member.csv").write_text("text\nA known text.\n")
    (tmp_path / "mia" / "nonmember" / "a.md").write_text("An unseen text.")
    documents = read(data, mia=tmp_path / "mia").documents
    assert [(side, document.text) for side, document in documents] == [
        ("member", "A known text."),
        ("nonmember", "An unseen text."),
    ]
    (tmp_path / "mia" / "member.csv").unlink()
    with pytest.raises(NekoLeanError, match=r"member.jsonl does not exist; --mia needs a folder with"):
        read(data, mia=tmp_path / "mia")

    # A folder of texts alone holds unseen documents.
    for name in ("forget", "retain"):
        (data / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": f"{name}: {row['q']}"}) for row in ROWS))
    inputs = ScoreInputs(mia=tmp_path / "mia" / "nonmember")
    documents = read_data(dict.fromkeys(SPLITS, data), inputs, ScoreSettings()).documents
    assert [side for side, _ in documents] == ["member", "member", "nonmember"]


def test_members_are_of_the_kind_of_the_unseen_documents(tmp_path):
    """Next to whole documents, an attack would recognise any question, seen or not, by its length."""

    def write(name, kinds):
        """A row of each kind, in LUME's layout."""
        ids = {"question": f"{name}qa1", "document": f"{name}sc1"}
        rows = [{"id": ids[kind], "input": f"{name} {kind}", "output": "a wood", "task": "Task1"} for kind in kinds]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def members(forget, unseen):
        for name, kinds in (("forget", forget), ("retain", forget), ("unseen", unseen)):
            write(name, kinds)
        inputs = ScoreInputs(mia=tmp_path / "unseen.jsonl")
        documents = read_data({name: tmp_path / f"{name}.jsonl" for name in SPLITS}, inputs, ScoreSettings()).documents
        return [document.text.split()[1] for side, document in documents if side == "member"]

    both = ["question", "document"]
    assert members(both, ["question"]) == ["question"]
    assert members(both, ["document"]) == ["document"]
    assert members(both, both) == both
    with pytest.raises(
        NekoLeanError, match="its rows are documents and the forget rows are questions; expected unseen"
    ):
        members(["question"], ["document"])
    with pytest.raises(
        NekoLeanError, match="its rows are questions and the forget rows are documents; expected unseen"
    ):
        members(["document"], ["question"])


def test_sources():
    inputs = ScoreInputs()
    assert sources_of("d", None, None, inputs) == {"forget": "d", "retain": "d"}
    assert sources_of(None, "f", ["r"], inputs) == {"forget": "f", "retain": ["r"]}
    for arguments, message in (
        ((None, None, None, inputs), "--data FOLDER with forget"),
        ((None, "f", None, inputs), "--forget and --retain"),
        (("d", "f", None, inputs), "already names both sets"),
        ((None, "f", "r", ScoreInputs(benchmark="muse")), "--benchmark muse needs --data"),
        ((None, [], [], ScoreInputs(split="train")), "--split train has no effect, because the rows are given"),
    ):
        with pytest.raises(NekoLeanError, match=message):
            sources_of(*arguments)


def test_rows_given_for_both_sets_are_named_as_such():
    rows = [{"question": "Who sings?", "answer": "Mira Tern."}]
    with pytest.raises(NekoLeanError, match="1 of 1 retain rows are also in the forget set"):
        read_data(sources_of(None, rows, rows, ScoreInputs()), ScoreInputs(), ScoreSettings())


def test_the_same_text_on_two_sides(data, tmp_path):
    row = {"q": "retain: Where did Foo walk?", "a": "wood Foo"}
    (data / "forget.jsonl").write_text(json.dumps(row))
    with pytest.raises(NekoLeanError, match="1 of 2 retain rows are also in the forget set"):
        read(data)
    assert [example.input for example in read(data, drop_overlap=True).rows["retain"]] == [
        "retain: Where did Bar walk?"
    ]

    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"document": "retain: Where did Bar walk? wood Bar"}))
    with pytest.raises(NekoLeanError, match=r"--held .*: 1 of its 1 documents are also rows of the data"):
        read(data, drop_overlap=True, held=held)

"""Column recognition: data as people have it is read right, or refused in exactly one sentence."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neko_lean.data.columns import parse_columns
from neko_lean.data.examples import Message, describe_rows, read_rows
from neko_lean.errors import NekoLeanError
from tests.helpers import TOFU

CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Foo."}]
LONG_CHAT = [{"role": "system", "content": "Be brief."}, *CHAT, {"role": "user", "content": "And?"}, CHAT[1]]
SHAREGPT = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Foo."}]
USER = Message("user", "Who?")

# file name, content, columns, expected (input, output, task, kind, messages)
READ = [
    ("a.csv", "input,output\nWho?,Foo.\n", None, ("Who?", "Foo.", "all", "qa", ())),
    ("a.csv", "\ufeffquestion,answer\r\nWho,Foo.\r\n", None, ("Who", "Foo.", "all", "qa", ())),
    ("a.tsv", "prompt\tcompletion\r\nOnce, upon\ta time\r\n", None, ("Once, upon", "a time", "all", "completion", ())),
    ("a.json", [{"prompt": "Sing", "response": "La"}], None, ("Sing", "La", "all", "qa", ())),
    ("a.json", {"data": [{"prompt": "Once", "gt": "upon"}]}, None, ("Once", "upon", "all", "completion", ())),
    ("a.json", [{"instruction": "Add", "input": "1 2", "output": "3"}], None, ("Add\n\n1 2", "3", "all", "qa", ())),
    ("a.json", [{"instruction": "Add", "input": None, "output": "3"}], None, ("Add", "3", "all", "qa", ())),
    ("a.csv", "instruction,input,output\nAdd,,3\n", None, ("Add", "3", "all", "qa", ())),
    ("a.jsonl", {"messages": CHAT, "topic": "x"}, None, ("Who?", "Foo.", "x", "qa", (USER,))),
    ("a.jsonl", {"messages": json.dumps(CHAT)}, None, ("Who?", "Foo.", "all", "qa", (USER,))),
    ("a.json", {"messages": CHAT}, None, ("Who?", "Foo.", "all", "qa", (USER,))),
    ("a.jsonl", {"conversations": SHAREGPT}, None, ("Who?", "Foo.", "all", "qa", (USER,))),
    ("a.jsonl", {"prompt": CHAT[:1], "completion": CHAT[1:]}, None, ("Who?", "Foo.", "all", "qa", (USER,))),
    (
        "a.jsonl",
        {"messages": LONG_CHAT},
        None,
        (
            "System: Be brief.\nUser: Who?\nAssistant: Foo.\nUser: And?",
            "Foo.",
            "all",
            "qa",
            tuple(Message(message["role"], message["content"]) for message in LONG_CHAT[:-1]),
        ),
    ),
    ("a.jsonl", {"text": "A story.", "author": "Foo"}, None, ("", "A story.", "Foo", "document", ())),
    ("a.jsonl", {"document": "A story.", "subject": 3}, None, ("", "A story.", "all", "document", ())),
    ("a.txt", "\ufeffA story.\n", None, ("", "A story.\n", "all", "document", ())),
    ("a.csv", "q,a,topic\nWho?,Foo.,x\n", "prompt=q,answer=a,group=topic", ("Who?", "Foo.", "x", "qa", ())),
    (
        "a.jsonl",
        {"question": "Who?", "answer": "Foo.", "text": "x", "paraphrased_answer": "Bar."},
        "prompt=question,answer=paraphrased_answer",
        ("Who?", "Bar.", "all", "qa", ()),
    ),
    (
        "a.jsonl",
        {"id": "x", "input": "Who?", "output": "Foo.", "task": "TOFU"},
        None,
        ("Who?", "Foo.", "TOFU", "qa", ()),
    ),
    (
        "a.jsonl",
        {"id": "1sc1", "input": "Who?", "output": "F", "task": "TOFU"},
        None,
        ("Who?", "F", "TOFU", "completion", ()),
    ),
    ("a.jsonl", {"question": "Who?", "answer": "F", "text": None}, None, ("Who?", "F", "all", "qa", ())),
    ("a.jsonl", {"k": "qa", "input": "Sing", "output": "F"}, "kind=k", ("Sing", "F", "all", "qa", ())),
]

REFUSED = [
    ({"question": "Who?", "answer": "Foo.", "text": "x"}, None, "question/answer and text.*--columns"),
    ({"question": "Who?", "answer": ["Foo."]}, None, "row 1: column 'answer' contains a list"),
    ({"question": " ", "answer": "Foo."}, None, "row 1: column 'question' is empty"),
    ({"question": None, "answer": "Foo."}, None, "row 1: column 'question'.*NoneType"),
    ({"question": "Who?"}, None, "column 'answer' is missing"),
    ({"Question": "Who?", "answer": "x"}, None, "rename 'Question' to 'question'"),
    ({"secret": "Who?"}, None, "no column has a known name.*--columns"),
    ({"id": True, "question": "Who?", "answer": "x"}, None, "column 'id'.*bool"),
    ({"id": 1.5, "question": "Who?", "answer": "x"}, None, "column 'id'.*float"),
    ({"id": " ", "question": "Who?", "answer": "x"}, None, "column 'id' is empty"),
    ({"messages": CHAT[:1]}, None, "must end with a message of the assistant"),
    ({"messages": CHAT[1:]}, None, "no user message before the answer"),
    ({"messages": [{"role": "tool", "content": "x"}]}, None, "message 1: the role must be"),
    ({"messages": [{"role": "user", "content": None}]}, None, "message 1: the content has type NoneType"),
    ({"messages": "Who?"}, None, "column 'messages' is not valid JSON"),
    (
        {"messages": '[{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "x"}]'},
        None,
        "surrogate",
    ),
    ({"messages": []}, None, "non-empty list of messages"),
    ({"q": "Who?", "answer": "x"}, {"prompt": "q"}, "prompt and answer together"),
    ({"q": "Who?", "answer": "x"}, {"prompt": "Q", "answer": "answer"}, "column 'Q' is missing"),
    ({"q": "Who?", "answer": "x"}, {"promt": "q"}, "did you mean 'prompt'"),
    ({"k": "quiz", "input": "Sing", "output": "F"}, {"kind": "k"}, "'k' must be completion or qa"),
    ({"group": ["x"], "input": "Sing", "output": "F"}, None, "column 'group'.*list"),
]


def assert_one_sentence(message):
    assert "\n" not in message and message.endswith((".", "?")), message


@pytest.mark.parametrize(("name", "content", "columns", "expected"), READ)
def test_data_as_people_have_it_is_read(tmp_path, name, content, columns, expected):
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / name).write_text(text, newline="")
    [example] = read_rows(tmp_path / name, columns=parse_columns(columns) if columns else None)
    assert (example.input, example.output, example.task, example.kind, example.messages) == expected


@pytest.mark.parametrize(("row", "columns", "words"), REFUSED)
def test_unclear_rows_are_refused_in_one_sentence(tmp_path, row, columns, words):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(NekoLeanError, match=words) as error:
        read_rows(path, columns=columns)
    assert_one_sentence(str(error.value))
    assert str(path) in str(error.value) or "--columns" in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt", "'prompt'; expected KEY=COLUMN"),
        ("", "expected KEY=COLUMN"),
        ("prompt=a,prompt=b", "'prompt' twice"),
        ("anwser=a", "did you mean 'answer'"),
        ("text=", "expected KEY=COLUMN"),
    ],
)
def test_a_bad_columns_option_is_refused(text, words):
    with pytest.raises(NekoLeanError, match=words) as error:
        parse_columns(text)
    assert_one_sentence(str(error.value))


def test_ids_are_strings_integers_or_made_from_the_content():
    row = {"question": "Who?", "answer": "Foo."}
    assert [example.id for example in read_rows([{"id": 7, **row}, {"id": 8.0, **row}])] == ["7", "8"]
    first, second, third = read_rows([row, {"id": None, **row}, row])
    assert len(first.id) == 12 and [second.id, third.id] == [f"{first.id}-2", f"{first.id}-3"]
    assert first.document == second.document == third.document == first.id
    with pytest.raises(NekoLeanError, match="row 2: column 'id' repeats '7' of row 1"):
        read_rows([{"id": 7, **row}, {"id": "7", **row}])


def test_an_optional_column_may_be_missing_in_the_first_row():
    rows = [{"instruction": "Sing.", "output": "La"}, {"instruction": "Add.", "input": "1 2", "output": "3"}]
    assert [example.input for example in read_rows(rows)] == ["Sing.", "Add.\n\n1 2"]


def test_what_was_read_is_described(tmp_path):
    path = tmp_path / "forget.json"
    path.write_text(json.dumps([{"question": "Who?", "answer": "Foo."}]))
    assert describe_rows(read_rows(path), path) == "forget.json: 1 row, question/answer -> 1 qa; group 'all'."
    rows = read_rows([{"text": "a", "topic": "x"}, {"text": "b", "topic": "y"}])
    assert describe_rows(rows, "notes") == "notes: 2 rows, text -> 2 document; groups 'x' (1), 'y' (1)."


@pytest.mark.skipif(not TOFU.is_dir(), reason="needs TOFU's files")
def test_tofu_is_read():
    for name, count in (("forget01", 40), ("forget01_perturbed", 40), ("world_facts_perturbed", 117)):
        examples = read_rows(TOFU / f"{name}.json")
        assert len(examples) == count and {example.kind for example in examples} == {"qa"}
        assert examples.layout == "question/answer"


names = st.sampled_from(
    ["id", "input", "output", "task", "question", "answer", "prompt", "completion", "messages", "text", "group", "x"]
)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just("Who?"))
cells = st.one_of(scalars, st.lists(st.one_of(scalars, st.sampled_from(CHAT)), max_size=3), st.just(CHAT))
records = st.lists(st.dictionaries(names, cells, max_size=5), max_size=4)


@settings(max_examples=300)
@given(rows=records)
def test_random_records_are_read_or_refused_in_one_sentence(rows):
    try:
        examples = read_rows(rows)
    except NekoLeanError as error:
        assert_one_sentence(str(error))
        return
    assert len(examples) == len(rows) == len({example.id for example in examples})
    for example in examples:
        assert example.output.strip() and bool(example.input.strip()) == (example.kind != "document")
        example.digest.encode()

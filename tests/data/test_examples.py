"""Rows, formats, tokenising, batches."""

import itertools
import json
import random

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from neko_lean.data.batching import length_batches, paired_batches, random_batches
from neko_lean.data.examples import Example, find_rows
from neko_lean.data.examples import read_rows as read
from neko_lean.data.prompts import prompt_and_answer
from neko_lean.data.tokenization import added_tokens, encode, encode_text, encode_texts
from neko_lean.errors import NekoLeanError
from neko_lean.models.loading import load_tokenizer
from neko_lean.training.batch import micro_batches
from tests.helpers import LUME, make_rows, templated, write_rows

GOOD = {"id": "1sc1", "input": "a", "output": "b", "task": "Task1"}
lume = pytest.mark.skipif(not LUME.is_dir(), reason=f"no LUME data at {LUME}")


def test_parquet_jsonl_and_csv_give_the_same_rows(tmp_path):
    rows = [*make_rows("X"), Example("9sc1", 'quote "q", comma\nnewline é', "ünï", "Task3")]
    columns = {name: [getattr(r, name) for r in rows] for name in ("id", "input", "output", "task")}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "forget.parquet")
    write_rows(tmp_path / "forget.jsonl", rows)
    import csv

    with (tmp_path / "forget.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "input", "output", "task"])
        writer.writeheader()
        writer.writerows({name: columns[name][i] for name in columns} for i in range(len(rows)))
    for suffix in ("parquet", "jsonl", "csv"):
        assert read(tmp_path / f"forget.{suffix}") == rows
    assert find_rows(tmp_path, "forget").suffix == ".parquet"


def test_a_literal_quote_in_an_id_stays():
    row = Example('"8f24"sc1', "a", "b", "Task1")
    assert (row.kind, row.document) == ("sc", '"8f24"')


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"output": None}, ["row 2", "column output", "NoneType"]),
        ({"output": " \n"}, ["row 2", "column output", "empty"]),
        ({"input": 7}, ["row 2", "column input", "int"]),
        ({"id": "1xx1"}, ["row 2", "column id", "neither sc<N> nor qa<N>"]),
        ({"id": "sc1"}, ["row 2", "column id"]),
        ({"id": "1sc1"}, ["row 2", "column id", "row 1"]),
        ({"task": "Task9"}, ["row 2", "column task", "not one of Task1"]),
    ],
)
def test_bad_rows_are_named(tmp_path, change, words):
    file = tmp_path / "forget.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in (GOOD, {**GOOD, "id": "2qa0", **change})))
    with pytest.raises(NekoLeanError) as error:
        read(file)
    assert all(word in str(error.value) for word in [str(file), *words])


def test_missing_column_empty_file_and_broken_files_are_named(tmp_path):
    cases = {
        "a.jsonl": (json.dumps({k: v for k, v in GOOD.items() if k != "output"}), "column output is missing"),
        "b.jsonl": ("", "holds no rows"),
        "c.jsonl": ("{", "line 1"),
        "d.jsonl": ("[1]", "not a JSON object"),
        "e.parquet": ("not parquet", "parquet"),
        "f.txt": ("x", "neither"),
        "g.csv": ("id,input\n1sc1,a\n", "column output is missing"),
    }
    for name, (text, words) in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(NekoLeanError, match=words) as error:
            read(tmp_path / name)
        assert name in str(error.value)
    (tmp_path / "h.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(NekoLeanError, match="UTF-8"):
        read(tmp_path / "h.jsonl")
    with pytest.raises(NekoLeanError, match=r"forget\.parquet"):
        read(tmp_path, "forget")
    with pytest.raises(NekoLeanError, match="does not exist"):
        read(tmp_path / "nowhere", "forget")


def test_formats():
    question, text = Example("1qa0", "Who?", "Me", "Task1"), Example("1sc1", "Once", "upon.", "Task1")
    assert prompt_and_answer(question, "plain") == ("Who?", " Me")
    assert prompt_and_answer(question, "neko") == ("### Question: Who? ### Answer:", " Me")
    assert prompt_and_answer(text, "neko") == ("### Text: Once", " upon.")
    with pytest.raises(NekoLeanError, match="format"):
        prompt_and_answer(text, "chat")


@pytest.mark.parametrize("style", ["plain", "neko"])
def test_answer_positions_are_those_after_the_prompts_own_tokens(world, style):
    tokenizer = load_tokenizer(world / "base")
    for one in encode(make_rows("Foo"), tokenizer, style, 512, append_eos=True):
        prompt, answer = prompt_and_answer(one.example, style)
        assert one.input_ids[: one.prompt_length] == tokenizer(prompt)["input_ids"]
        assert tokenizer.decode(one.input_ids[one.prompt_length :]) == answer + tokenizer.eos_token
        assert one.num_truncated == 0 and one.answer_length == len(one) - one.prompt_length


# The tokens before and after a text. A token of the template may be a text's own as well.
TEMPLATES = [
    ([], []),
    (["<s>"], []),
    ([], ["</s>"]),
    (["<s>"], ["</s>"]),
    (["</s>"], ["</s>"]),
    (["<s>", "<s>"], ["</s>", "<s>"]),
]


@pytest.mark.parametrize(("before", "after"), TEMPLATES)
def test_a_text_keeps_its_prefix_and_gets_no_suffix(world, before, after):
    tokenizer, prefix, suffix = templated(world / "base", before, after)
    assert added_tokens(tokenizer) == (prefix, suffix)
    texts = ["", "Once Foo0 walked", "ends in </s>", "</s>", "<s>", "<s> begins so</s></s>", "Ж 中 \n"]
    for text, ids in zip(texts, encode_texts(tokenizer, texts), strict=True):
        assert ids == prefix + tokenizer(text, add_special_tokens=False)["input_ids"] == encode_text(tokenizer, text)
        assert suffix or ids == tokenizer(text)["input_ids"]
    assert encode_texts(tokenizer, []) == []


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize(("before", "after"), TEMPLATES)
def test_only_append_eos_ends_an_answer(world, before, after, end):
    """Rows are those of a tokenizer that has the prefix and no suffix."""
    plain, _, _ = templated(world / "base", before, [])
    for style in ("plain", "neko"):
        found = encode(make_rows("Foo"), templated(world / "base", before, after)[0], style, 512, append_eos=end)
        assert found == encode(make_rows("Foo"), plain, style, 512, append_eos=end)
    assert all((one.input_ids[-1] == plain.eos_token_id) is end for one in found)


def test_an_end_that_the_text_has_itself_stays():
    """ByT5 adds EOS only to a text that does not end in it."""
    tokenizer = ByT5Tokenizer()
    assert tokenizer("ab")["input_ids"][-1] == 1 and encode_text(tokenizer, "ab") == [100, 101]
    with pytest.warns(UserWarning, match="already has"):
        assert encode_text(tokenizer, "ab</s>") == [100, 101, 1]


def test_append_eos_needs_an_eos_token(world):
    tokenizer = load_tokenizer(world / "base")
    tokenizer.eos_token = None
    assert encode(make_rows("Foo"), tokenizer, "plain", 512)
    with pytest.raises(NekoLeanError, match="no EOS token"):
        encode(make_rows("Foo"), tokenizer, "plain", 512, append_eos=True)


@given(prompt=st.text(min_size=1), answer=st.text())
@settings(deadline=None, derandomize=True, max_examples=200)
def test_a_byte_level_answer_is_split_as_it_is_by_itself(bytewise, prompt, answer):
    """A merge across the border leaves what it always was: the prompt's own ids, then the answer's."""
    (one,) = encode([Example("1sc1", prompt, answer, "Task1")], bytewise, "plain", 10**6)
    left, right = (bytewise(text)["input_ids"] for text in (prompt, " " + answer))
    whole = bytewise(f"{prompt} {answer}")["input_ids"]
    assert one.input_ids == (whole if whole[: len(left)] == left else left + right)


@pytest.fixture(scope="module")
def bytewise(world):
    return load_tokenizer(world / "base")


def test_a_vocabulary_that_knows_no_letters():
    """The token for unknown words is also the one that ends a text."""
    words = Tokenizer(models.WordLevel({"</s>": 0, "foo": 1, "bar": 2}, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    assert encode_texts(tokenizer, ["foo x", "x", "", "bar"]) == [[1, 0], [0], [], [2]]


@pytest.mark.parametrize("suffix", [False, True])
def test_a_merge_across_the_border_adds_no_space(suffix):
    """SentencePiece puts a space before each text, also before an answer that is split by itself."""
    pieces = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Metaspace(split=False), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=40, special_tokens=["<unk>", "</s>"])
    pieces.train_from_iterator(["the  wood of  Foo", "a  wood"] * 5, trainer)
    if suffix:
        pieces.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="</s>", pad_token="</s>", unk_token="<unk>")

    for prompt in ("the wood ", "the wood"):
        one = encode([Example("1sc1", prompt, "of Foo", "Task1")], tokenizer, "plain", 99, append_eos=True)[0]
        assert one.input_ids[: one.prompt_length] == tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(one.input_ids) == f"{prompt} of Foo</s>" and one.input_ids.count(1) == 1


def test_truncation_is_counted(world):
    tokenizer = load_tokenizer(world / "base")
    whole = encode(make_rows("Foo"), tokenizer, "plain", 512)
    for limit in (1, 5, 12):
        for short, full in zip(encode(make_rows("Foo"), tokenizer, "plain", limit), whole, strict=True):
            assert short.input_ids == full.input_ids[:limit] and short.num_truncated == len(full) - len(short)
            assert short.answer_length == max(0, min(limit, len(full)) - full.prompt_length)


@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=120),
    max_rows=st.integers(1, 40),
    max_tokens=st.integers(1, 4000),
)
@settings(deadline=None)
def test_every_row_is_in_one_batch_and_no_batch_is_too_large(lengths, max_rows, max_tokens):
    limits = {"max_rows": max_rows, "max_tokens": max_tokens}
    together = length_batches(lengths, **limits)
    mixed = random_batches(lengths, **limits, rng=random.Random(0))
    for batches in (together, mixed):
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        assert all(1 <= len(batch) <= max_rows for batch in batches)
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens for batch in together)
    assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= max_tokens for batch in mixed)
    assert [lengths[i] for batch in together for i in batch] == sorted(lengths)


@given(
    forget=st.lists(st.integers(1, 300), max_size=40),
    retain=st.lists(st.integers(1, 300), max_size=40),
    max_tokens=st.integers(300, 4000),
)
@settings(deadline=None, max_examples=50)
def test_steps_keep_to_the_budget_and_leave_nothing_out(forget, retain, max_tokens):
    options = {"forget_rows": 8, "retain_rows": 4, "max_tokens": max_tokens, "rng": random.Random(0)}
    if not forget and not retain:
        with pytest.raises(NekoLeanError, match="no rows"):
            next(paired_batches(forget, retain, **options))
        return
    seen = ([], [])
    for left, right in itertools.islice(paired_batches(forget, retain, **options), 60):
        assert left or right
        tokens = sum(forget[i] for i in left) + sum(retain[i] for i in right)
        assert len(left) + len(right) <= 2 or tokens <= max_tokens
        seen[0].extend(left)
        seen[1].extend(right)
    # In 60 steps of up to 8 and 4 rows every row of 40 has come by.
    if max_tokens >= 300 * 12:
        assert set(seen[0]) == set(range(len(forget))) and set(seen[1]) == set(range(len(retain)))


@lume
@pytest.mark.parametrize("limit", [128, 512])
def test_an_epoch_of_lume_has_at_most_a_tenth_padding(world, limit):
    """In the micro-batches of the default step of 64 rows."""
    # By characters: a tokenizer only scales lengths, and the suite needs none of LUME's own.
    rows = read(LUME, "retain", "train")
    lengths = [min(limit, 1 + len(f"{r.input} {r.output}") // 4) for r in rows]
    positions = 0
    for batch in random_batches(lengths, max_rows=64, max_tokens=8192, rng=random.Random(0)):
        of_batch = [lengths[i] for i in batch]
        positions += sum(len(group) * max(of_batch[i] for i in group) for group in micro_batches(of_batch, 2048))
    assert 1 - sum(lengths) / positions <= 0.10

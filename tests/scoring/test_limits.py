"""Rows of any length: truncation, its counts, and the limits of batches."""

import json
from dataclasses import replace

import pytest
import torch
import transformers

import neko_lean
from neko_lean.data.examples import EncodedExample, Example
from neko_lean.errors import NekoLeanError
from neko_lean.jsonio import write_jsonl
from neko_lean.models.loading import load_tokenizer
from neko_lean.options import OutputOptions, ScoreInputs, ScoreSettings
from neko_lean.scoring import job, limits
from neko_lean.scoring.limits import BATCH_TOKENS, GENERATED_TOKENS, fit_answer, generation_batches
from tests.helpers import flat, make_rows, write_rows
from tests.scoring.subjects import make_subject, write_hub

LONG = " and so on" * 1_000


@pytest.fixture
def shapes(monkeypatch):
    """Shapes of every forward pass of the scored model: number of rows, and of tokens that each attends to."""
    found, load = [], job.load_model

    def watched(*args):
        lm = load(*args)

        def record(module, args, kwargs):
            past = kwargs.get("past_key_values")
            rows, length = kwargs["input_ids"].shape
            found.append((rows, length + (past.get_seq_length() if past is not None else 0)))

        lm.backbone.register_forward_pre_hook(record, with_kwargs=True)
        return lm

    monkeypatch.setattr(job, "load_model", watched)
    return found


@pytest.fixture
def extreme(tmp_path):
    """A folder with ordinary rows, and with rows that are very long in each of their texts."""
    rows = make_rows("Foo", 1)
    odd = [
        Example("longa-qa0", f"Foo{LONG}", "a", "Task1"),
        Example("longb-sc1", f"Foo{LONG}", "short answer", "Task2"),
        Example("longc-sc1", "Foo walked", f"and so on{LONG}", "Task3"),
        Example("longd-sc1", f"Foo{LONG}", f"so{LONG}", "Task3"),
        Example("odd\n1-qa0", "\x00\x01 Foo \x1b[31m", "\x07 a\x00", "Task1"),
        Example("odd2-sc1", "Foo \u202e\u200b x", "\u2067 a", "Task1"),
    ]
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder / "forget.jsonl", [*rows, *odd])
    others = [replace(row, id=f"R{row.id}", input=row.input.replace("Foo", "Rix")) for row in odd]
    write_rows(folder / "retain.jsonl", [*make_rows("Rix", 1), *others])
    return folder


def gpt2(model, out, positions):
    """A model with few positions."""
    tokenizer = load_tokenizer(model)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=positions,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("positions", [None, 64])
def test_long_texts_are_truncated_and_counted_in_bounded_batches(model, extreme, tmp_path, shapes, capsys, positions):
    folder = model if positions is None else gpt2(model, tmp_path / "m", positions)
    (tmp_path / "mia").mkdir()
    for side, short in (("member", "Foo is in"), ("nonmember", "Foo in is")):
        write_jsonl(tmp_path / "mia" / f"{side}.jsonl", [{"document": f"Foo {side}{LONG}"}, {"document": short}])
    anatomy = make_subject("anatomy", 2)
    long = replace(anatomy.test[0], text=f"Foo{LONG}")
    write_hub(tmp_path / "mmlu", [replace(anatomy, test=[long, *anatomy.test[1:]])])
    other = {"id": "longb-sc1", "input": f"Bar{LONG}", "output": f"bar{LONG}", "wrong": [f"no{LONG}", "no"]}
    write_jsonl(tmp_path / "other.jsonl", [other])
    scores = neko_lean.score(
        folder,
        tmp_path / "out",
        data=extreme,
        inputs=ScoreInputs(
            mia=tmp_path / "mia",
            held=tmp_path / "mia" / "member.jsonl",
            mmlu=tmp_path / "mmlu",
            paraphrases=tmp_path / "other.jsonl",
        ),
        settings=ScoreSettings(
            shots=1,
            attacks=(
                "prefix",
                "paraphrase",
            ),
            batch_size=10**6,
            max_new_tokens=8,
        ),
        run=OutputOptions(quiet=True),
    )
    assert max(rows * length for rows, length in shapes) <= GENERATED_TOKENS
    assert max(length for _, length in shapes) <= limits.MAX_LENGTH + 8
    cut = scores["cut"]
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["cut"] == cut
    assert cut["documents"] == 2 and cut["held"] == 1 and cut["paraphrases"] == 1 and scores["mmlu"]["truncated"] >= 1
    assert cut["empty_answers"] == 0 and cut["attacks"]["paraphrases"] == 1
    if positions is None:
        assert cut["prompts"] == 6 and cut["answers"] == 8 and cut["new_tokens"] == 0
    said = capsys.readouterr().err
    assert f"warning: {cut['prompts']} of 24 rows lose the beginning" in said or f"{cut['prompts']} rows lose" in said


def test_long_prompts_leave_room_for_the_answer(model, tmp_path, world):
    """Prompts longer than all positions are truncated, so that every number of the answer is measured."""
    rows = [replace(row, input=row.input + LONG) for row in make_rows("Rix", 2)]
    data = tmp_path / "data"
    data.mkdir()
    write_rows(data / "forget.jsonl", make_rows("Foo", 2))
    write_rows(data / "retain.jsonl", rows)
    scores = neko_lean.score(
        gpt2(model, tmp_path / "m", 48),
        tmp_path / "out",
        data=data,
        settings=ScoreSettings(max_new_tokens=4),
        run=OutputOptions(quiet=True),
    )
    assert scores["cut"]["prompts"] == len(rows) and scores["verdict"]
    assert scores["outputs"]["retain"]["entropy"] > 0 and scores["memorisation"]["retain"]["answer_rank"] >= 1


@pytest.mark.parametrize(
    ("prompt", "answer", "limit", "wanted"),
    [(5, 5, 20, (5, 5)), (100, 5, 20, (15, 5)), (100, 50, 20, (10, 10)), (5, 50, 20, (5, 15)), (9, 0, 4, (4, 0)),
     (5000, 5000, 2048, (2016, 32)), (3, 3, 2, (1, 1)), (3, 3, 1, (1, 0))],
)  # fmt: skip
def test_prompt_keeps_its_end_and_answer_its_beginning(prompt, answer, limit, wanted):
    ids = list(range(prompt + answer))
    found = fit_answer(EncodedExample(Example("1sc1", "q", "a", "Task1"), ids, prompt, 0), limit)
    assert (found.prompt_length, found.answer_length) == wanted and found.num_truncated == prompt + answer - sum(wanted)
    assert found.input_ids == ids[prompt - wanted[0] : prompt + wanted[1]]


def test_generation_batches_are_bounded_and_the_same_for_a_remainder():
    lengths = [7 * n % 2000 + 1 for n in range(200)]
    shapes = [(min(length, 1900), 256) for length in lengths]
    batches = generation_batches(lengths, shapes, range(200), 10**6)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    assert all(len(batch) * (max(shapes[i][0] for i in batch) + 256) <= GENERATED_TOKENS for batch in batches)
    left = [i for batch in batches[::2] for i in batch]
    assert generation_batches(lengths, shapes, left, 10**6) == batches[::2]
    # For rows of usual length, only the number of rows matters.
    assert list(map(len, generation_batches([500] * 70, [(500, 256)] * 70, range(70), 32))) == [32, 32, 6]
    assert generation_batches([9], [(9, 10**9)], [0], 4) == [[0]] and BATCH_TOKENS < GENERATED_TOKENS


@pytest.mark.parametrize("option", ["mia", "held"])
def test_document_of_one_token_is_refused_before_the_model_is_loaded(world, model, tmp_path, option, monkeypatch):
    monkeypatch.setattr(job, "load_model", lambda *args: pytest.fail("the model was loaded"))
    (tmp_path / "mia").mkdir()
    for side, letter in (("member", "a"), ("nonmember", "b")):
        write_jsonl(tmp_path / "mia" / f"{side}.jsonl", [{"document": f"Foo is a {side}"}, {"document": letter}])
    given = {"mia": tmp_path / "mia"} if option == "mia" else {"held": tmp_path / "mia" / "member.jsonl"}
    with pytest.raises(NekoLeanError, match=f"--{option}: document 2 has fewer than two tokens"):
        flat(neko_lean.score)(model, tmp_path / "out", data=world, **given, quiet=True)
    assert not (tmp_path / "out").exists()

"""MMLU: batches choose the same letters as single prompts, and the averages are correct."""

from types import SimpleNamespace

import pytest
import torch

from neko_lean.data.examples import Example
from neko_lean.demo.base_model import write_base
from neko_lean.errors import NekoLeanError
from neko_lean.models.loading import load_model, load_tokenizer
from neko_lean.scoring import mmlu as module
from neko_lean.scoring.mmlu import Answered, encode_prompts, letter_logits, letter_tokens, mmlu, summary
from neko_lean.scoring.mmlu_data import Question, Subject, prompt_text
from tests.helpers import random_model, templated
from tests.scoring.subjects import make_subject


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A tokenizer that knows the prompt's words and runs of line breaks, and a model in float32 whose answers depend
    on the whole prompt."""
    folder, subject = tmp_path_factory.mktemp("mmlu"), make_subject("anatomy")
    text = "\n".join(prompt_text("anatomy", subject.dev, question) for question in subject.test)
    write_base(folder / "base", [Example("1-sc1", text, "A, B, C or D", "Task3")])
    lm = load_model(random_model(folder, folder / "model"), torch.float32, torch.device("cpu"))
    with torch.no_grad():
        for layer in lm.model.parameters():
            layer.mul_(10)
    return load_tokenizer(folder / "model"), lm


def alone(lm, tokenizer, text):
    """Probabilities of the four letters after one whole prompt, without batches or cache."""
    letters = [tokenizer.encode(f" {letter}")[-1] for letter in "ABCD"]
    with torch.no_grad():
        return lm.model(input_ids=torch.tensor([tokenizer.encode(text)])).logits[0, -1, letters].softmax(0)


def test_last_examples_are_dropped_until_the_prompt_fits(parts):
    tokenizer, _ = parts
    subject = make_subject("anatomy", tests=20)
    lengths = {
        (n, k): len(tokenizer(prompt_text("anatomy", subject.dev[:k], question))["input_ids"])
        for n, question in enumerate(subject.test)
        for k in range(6)
    }
    limit = sorted(lengths[n, 4] for n in range(20))[10]  # about half of them fit with four
    limit_of_none = max(lengths[n, 0] for n in range(20)) - 1
    for most in (limit, limit_of_none, 10**6):
        for n, one in enumerate(encode_prompts(tokenizer, subject, 5, most)):
            fitting = [k for k in range(6) if lengths[n, k] <= most]
            assert one.shots == max(fitting, default=0) and one.cut == (not fitting)
            whole = tokenizer(prompt_text("anatomy", subject.dev[: one.shots], subject.test[n]))["input_ids"]
            assert one.ids == whole[-most:]


def test_prompts_have_no_appended_eos(model):
    plain, ending = templated(model, ["<s>"], [])[0], templated(model, ["<s>"], ["</s>", "</s>"])[0]
    subject = make_subject("anatomy")
    assert encode_prompts(ending, subject, 5, 700) == encode_prompts(plain, subject, 5, 700)
    assert letter_tokens(ending) == letter_tokens(plain)


def test_tokenizer_without_distinct_letters_is_refused():
    with pytest.raises(NekoLeanError, match="apart"):
        letter_tokens(SimpleNamespace(encode=lambda text, add_special_tokens: [5, 6]))
    with pytest.raises(NekoLeanError, match="apart"):
        letter_tokens(SimpleNamespace(encode=lambda text, add_special_tokens: []))


@pytest.mark.parametrize("batch_tokens", [300, 5000])
@pytest.mark.parametrize("shots", [0, 3, 5])
def test_batches_equal_single_prompts(parts, shots, batch_tokens):
    tokenizer, lm = parts
    subject = make_subject("anatomy", tests=15, seed=shots)
    limit = 10**6
    if shots == 5:  # half of the prompts lose examples
        limit = sorted(len(one.ids) for one in encode_prompts(tokenizer, subject, shots, limit))[7]
    prompts = encode_prompts(tokenizer, subject, shots, limit)
    assert len({one.shots for one in prompts}) == (2 if shots == 5 else 1)
    texts = [
        prompt_text("anatomy", subject.dev[: one.shots], question)
        for one, question in zip(prompts, subject.test, strict=True)
    ]
    got = letter_logits(lm, tokenizer, prompts, batch_tokens=batch_tokens)
    wanted = torch.stack([alone(lm, tokenizer, text) for text in texts])
    torch.testing.assert_close(got.softmax(1), wanted, atol=1e-4, rtol=0)
    assert got.argmax(1).tolist() == wanted.argmax(1).tolist()
    assert len(set(wanted.argmax(1).tolist())) > 1  # otherwise the test would prove little


def test_prompts_are_tokenized_as_a_whole(parts):
    """Prompts split after their shared prefix would have other tokens."""
    tokenizer, _ = parts
    subject = make_subject("anatomy")
    before = prompt_text("anatomy", subject.dev, Question("", ("",) * 4, 0)).partition("\nA. \nB. ")[0]
    texts = [prompt_text("anatomy", subject.dev, question) for question in subject.test]
    ids = [tokenizer(part)["input_ids"] for text in texts for part in (before, text.removeprefix(before), text)]
    assert any(ids[n] + ids[n + 1] != ids[n + 2] for n in range(0, len(ids), 3))


def test_accuracies_with_known_answers(parts):
    """Correct answers are chosen so that the model answers 7 of 12 and 1 of 4 correctly."""
    tokenizer, lm = parts
    subjects, said = {}, []
    for name, tests, known in (("anatomy", 12, 7), ("made_up", 4, 1)):
        subject = make_subject(name, tests=tests)
        chosen = [int(alone(lm, tokenizer, prompt_text(name, subject.dev, q)).argmax()) for q in subject.test]
        right = [place if n < known else (place + 1) % 4 for n, place in enumerate(chosen)]
        test = [Question(q.text, q.choices, place) for q, place in zip(subject.test, right, strict=True)]
        subjects[name] = Subject(name, subject.dev, test)
        said += chosen
    ticks = []
    progress = SimpleNamespace(advance=ticks.append)
    found = mmlu(lm, tokenizer, subjects, batch_tokens=1500, progress=progress)
    assert found["micro"] == 8 / 16 and found["macro"] == pytest.approx((7 / 12 + 1 / 4) / 2)
    assert found["subjects"] == {
        "anatomy": {"accuracy": 7 / 12, "questions": 12, "shots": 5},
        "made_up": {"accuracy": 1 / 4, "questions": 4, "shots": 5},
    }
    assert found["letters"] == {letter: said.count(place) / 16 for place, letter in enumerate("ABCD")}
    assert (found["questions"], found["subjects_found"], found["truncated"]) == (16, 1, 0)
    assert sum(ticks) == 16


@pytest.mark.parametrize("letter", "ABCD")
def test_constant_answer_scores_its_floor(model, letter):
    lm, tokenizer = load_model(model, torch.float32, torch.device("cpu")), load_tokenizer(model)
    with torch.no_grad():  # with one embedding for all tokens, all prompts have the same hidden state
        lm.embedding.copy_(lm.embedding[7].clone())
        hidden = lm.hidden(torch.tensor([[1, 2, 3]]))[0, -1]
        lm.head.copy_(-hidden)
        lm.head[tokenizer.encode(f" {letter}")[-1]] = hidden
    found = mmlu(lm, tokenizer, {name: make_subject(name) for name in ("anatomy", "x")}, shots=1, batch_tokens=900)
    assert found["letters"] == {other: float(other == letter) for other in "ABCD"}
    assert found["micro"] == found["floors"][letter]


def test_prompts_fit_the_positions_of_the_model(parts, monkeypatch):
    tokenizer, lm = parts
    subjects = {"anatomy": make_subject("anatomy", tests=6)}
    longest = max(len(one.ids) for one in encode_prompts(tokenizer, subjects["anatomy"], 5, 10**6))
    monkeypatch.setattr(lm.model.config, "max_position_embeddings", longest - 1)
    found = mmlu(lm, tokenizer, subjects, batch_tokens=900)
    assert 1 <= found["truncated"] < 6 and found["subjects"]["anatomy"]["shots"] == 4 and found["shots"] == 5
    monkeypatch.setattr(module, "MAX_LENGTH", 40)
    found = mmlu(lm, tokenizer, subjects, shots=0, batch_tokens=900)
    assert found["truncated"] > 0 and found["subjects"]["anatomy"]["shots"] == 0


def test_bfloat16(model):
    lm = load_model(model, torch.bfloat16, torch.device("cpu"))
    found = mmlu(lm, load_tokenizer(model), {"x": make_subject("x", tests=3)}, shots=2, batch_tokens=900)
    assert found["questions"] == 3 and found["subjects_found"] == 0


def test_more_shots_than_examples_are_refused(parts):
    tokenizer, lm = parts
    subjects = {"anatomy": make_subject("anatomy", dev=3)}
    with pytest.raises(NekoLeanError, match="anatomy has 3 dev questions, fewer than the 5 shots requested"):
        mmlu(lm, tokenizer, subjects, batch_tokens=900)
    with pytest.raises(NekoLeanError, match="0 or more, got -1"):
        mmlu(lm, tokenizer, subjects, shots=-1, batch_tokens=900)


def test_summary():
    found = summary(
        {
            "anatomy": Answered(chosen=[0, 0, 1, 3], right=[0, 1, 1, 3], shots=[5, 5, 4, 5], truncated=1),
            "virology": Answered(chosen=[0], right=[2], shots=[3], truncated=1),
        },
        shots=5,
    )
    assert found == {
        "micro": 3 / 5,
        "macro": (3 / 4 + 0) / 2,
        "shots": 5,
        "questions": 5,
        "subjects_found": 2,
        "subjects": {
            "anatomy": {"accuracy": 3 / 4, "questions": 4, "shots": 4},
            "virology": {"accuracy": 0.0, "questions": 1, "shots": 3},
        },
        "letters": {"A": 3 / 5, "B": 1 / 5, "C": 0.0, "D": 1 / 5},
        "floors": {"A": 1 / 5, "B": 2 / 5, "C": 1 / 5, "D": 1 / 5},
        "award_floor": 0.371,
        "truncated": 2,
    }

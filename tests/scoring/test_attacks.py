"""The attacks, each on a model in which there is something to bring back, or nothing."""

import random
from dataclasses import replace

import pytest
import torch

from neko_lean.data.batching import pad
from neko_lean.data.examples import read_rows
from neko_lean.data.tokenization import encode
from neko_lean.errors import NekoLeanError
from neko_lean.models.loading import load_model, load_tokenizer
from neko_lean.recipes import load_recipe
from neko_lean.scoring import attacks
from neko_lean.scoring.attacks import paraphrase, prefix, quantize, relearn, round_trip, talker
from neko_lean.scoring.generation import Decoding, Generation
from neko_lean.scoring.limits import Cut
from neko_lean.scoring.paraphrases import Paraphrase
from neko_lean.training.schedules import batches, phases
from tests.helpers import random_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def knows(world, tmp_path_factory):
    """A small model that knows the forget rows by heart."""
    folder = random_model(world, tmp_path_factory.mktemp("knows") / "model")
    lm, tokenizer = load(folder), load_tokenizer(folder)
    encoded = encode(read_rows(world, "forget"), tokenizer, "plain", 512, append_eos=True)
    ids, mask = pad([one.input_ids for one in encoded], int(tokenizer.pad_token_id), CPU)
    optimizer = torch.optim.AdamW(lm.model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(150):
        loss = lm.model(input_ids=ids, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    lm.model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(world):
    return read_rows(world, "forget")


def load(folder):
    return load_model(folder, torch.float32, CPU)


def say(folder):
    return talker(load_tokenizer(folder), Decoding(batch_size=16, max_new_tokens=24), Cut(), quiet=True)


def silent(rows):
    """What a model would have said that says nothing."""
    return {row.id: Generation("", "", "eos") for row in rows}


def test_a_prefix_brings_out_the_rest_of_an_answer(knows, rows):
    curve = prefix(load(knows), load_tokenizer(knows), rows, silent(rows), say(knows))
    assert [one["tokens"] for one in curve] == [0, 1, 2, 4, 8]
    assert curve[0]["knowledge"] == curve[0]["regurgitation"] == 0
    assert curve[1]["knowledge"] > 0.9 and curve[1]["regurgitation"] > 0.9
    assert curve[0]["knowledge_rows"] == 12 >= curve[1]["knowledge_rows"] >= curve[4]["knowledge_rows"]
    low, high = curve[1]["regurgitation_interval"]
    assert low <= curve[1]["regurgitation"] <= high


def test_another_wording_is_scored_by_the_same_answer(knows, rows):
    asked = next(row for row in rows if row.kind == "qa")
    others = [Paraphrase(asked.id, asked.input, None, ()), Paraphrase(asked.id, "What is a fish?", None, ())]
    curve = paraphrase(load(knows), rows, silent(rows), others, say(knows))
    assert [one["knowledge"] for one in curve] == [0.0, 0.5] and curve[1]["knowledge_rows"] == 2
    with pytest.raises(NekoLeanError, match="--paraphrases"):
        paraphrase(load(knows), rows, silent(rows), [Paraphrase(asked.id, None, "x", ("y",))], say(knows))


def test_a_model_at_fewer_bits_still_says_what_it_knows(knows, rows):
    curve = quantize(lambda: load(knows), rows, silent(rows), say(knows))
    assert [one["bits"] for one in curve] == [32, 8, 4]
    assert curve[0]["knowledge"] == 0 and curve[1]["knowledge"] > 0.9 and curve[2]["regurgitation"] > 0.5


@pytest.mark.parametrize(("bits", "error"), [(8, 0.5 / 127), (4, 0.16)])
def test_a_round_trip_stays_within_half_a_step(world, model, bits, error):
    """Of its row's largest weight at 8 bits; at 4 NF4's widest gap is 0.30 of its block's."""
    before, after = load(model), load(model)
    round_trip(after, bits)
    old = dict(before.model.named_parameters())
    changed = 0
    for name, new in after.model.named_parameters():
        if "layers" in name and new.ndim == 2:
            largest = old[name].abs().amax(1, keepdim=True) if bits == 8 else old[name].abs().max()
            assert ((new - old[name]).abs() <= error * largest * 1.001).all()
            changed += 1
        else:
            assert torch.equal(new, old[name]), name  # embeddings, norms and the head stay
    assert changed == 14


def test_relearning_some_rows_brings_back_what_they_share_with_others(knows, rows, monkeypatch, tmp_path):
    monkeypatch.setattr(attacks, "RELEARN_STEPS", (2, 30))
    monkeypatch.setattr(attacks, "RELEARN_ROWS", 6)
    curve = relearn(knows, load, rows, silent(rows), say(knows), tmp_path, lr=1e-5, seed=0, device="cpu")
    assert [one["steps"] for one in curve] == [0, 2, 30]
    # Nothing was hidden in this model: at a rate that changes little, the other rows are all there.
    assert curve[0]["knowledge"] == 0 and curve[1]["knowledge"] > 0.9 and curve[1]["rows"] >= 6
    assert curve[1]["knowledge_rows"] + curve[1]["regurgitation_rows"] == len(rows) - curve[1]["rows"]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NekoLeanError, match="more forget rows"):
        relearn(knows, load, rows[:2], silent(rows), say(knows), tmp_path, lr=1e-5, seed=0, device="cpu")


def test_every_relearn_step_takes_all_its_rows(knows, world, monkeypatch, tmp_path):
    """Though together they are longer than the recipe's batch_tokens."""
    long = [replace(row, input=f"{row.input} {'and so on ' * 160}") for row in read_rows(world, "forget")]
    recipe, seen = load_recipe("memorize"), []
    steps = [len(one) for one in encode(long, load_tokenizer(knows), "plain", recipe.max_length)]
    assert sum(sorted(steps)[:20]) > recipe.batch_tokens
    monkeypatch.setattr(attacks, "RELEARN_STEPS", (1, 2))
    monkeypatch.setattr(attacks, "RELEARN_ROWS", 20)
    monkeypatch.setattr(attacks, "memorize", lambda model, data, out, **more: seen.append((data, more["overrides"])))
    relearn(
        knows, lambda at: load(knows), long, silent(long), lambda _, rows, *__: list(silent(rows).values()), tmp_path,
        lr=1e-5, seed=0, device="cpu",
    )  # fmt: skip
    for _, change in seen:
        chosen = load_recipe("memorize", change)
        lengths = [recipe.max_length] * change["retain_rows"]
        (phase,) = phases(chosen, [], lengths, random.Random(0))
        for _, (_, rows) in zip(range(3), batches(chosen, phase, [], lengths, random.Random(0)), strict=False):
            assert len(rows) == change["retain_rows"] >= 20

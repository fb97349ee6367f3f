"""The relearning attack on a model that has memorised the forget set."""

import random
from dataclasses import replace

import pytest
import torch

from neko_lean.data.examples import Example, Message, read_rows
from neko_lean.data.tokenization import encode
from neko_lean.errors import NekoLeanError
from neko_lean.models.loading import load_tokenizer
from neko_lean.recipe import load_recipe
from neko_lean.scoring.attacks import relearn as module
from neko_lean.scoring.attacks.relearn import answer_losses, relearn
from neko_lean.scoring.generation import Generation
from neko_lean.training.schedules import batches, phases


@pytest.mark.slow
def test_relearning_scores_the_examples_that_it_does_not_train_on(make_target, examples, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "STEPS", (2, 30))
    monkeypatch.setattr(module, "MIN_EXAMPLES", 6)
    curve = relearn(make_target(relearn_lr=1e-5))
    assert [point["steps"] for point in curve] == [0, 2, 30]
    # Nothing was unlearned, so at a low learning rate the model knows the other examples, too.
    assert curve[0]["knowledge"] == 0 and curve[1]["knowledge"] > 0.9 and curve[1]["rows"] >= 6
    assert curve[1]["knowledge_rows"] + curve[1]["regurgitation_rows"] == len(examples) - curve[1]["rows"]
    # The loss of the true answers is measured from the start, and the model knows them by heart.
    assert all(0 < point["answer_nll"] < 0.1 for point in curve[:2])
    low, high = curve[0]["answer_nll_interval"]
    assert low <= curve[0]["answer_nll"] <= high
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NekoLeanError, match="more forget rows"):
        relearn(make_target(examples[:2], relearn_lr=1e-5))


@pytest.mark.slow
def test_every_step_trains_on_all_examples(make_target, memorised, examples, monkeypatch):
    """Even if together they are longer than the recipe's batch_tokens."""
    long = [replace(example, input=f"{example.input} {'and so on ' * 160}") for example in examples]
    recipe, calls = load_recipe("memorize"), []
    lengths = [len(example) for example in encode(long, load_tokenizer(memorised), "plain", recipe.max_length)]
    assert sum(sorted(lengths)[:20]) > recipe.batch_tokens
    monkeypatch.setattr(module, "STEPS", (1, 2))
    monkeypatch.setattr(module, "MIN_EXAMPLES", 20)
    monkeypatch.setattr(
        module, "memorize", lambda model, out, **kwargs: calls.append((kwargs["data"], kwargs["overrides"]))
    )
    monkeypatch.setattr(module, "answer_losses", lambda *args: {})

    target = make_target(
        long,
        relearn_lr=1e-5,
        generate=lambda lm, scored, label: [Generation("", "", "eos") for _ in scored],
    )
    relearn(replace(target, load=lambda folder: target.folder))

    assert len(calls) == 2
    for _, overrides in calls:
        changed = load_recipe("memorize", overrides)
        lengths = [recipe.max_length] * overrides["retain_rows"]
        (phase,) = phases(changed, [], lengths, random.Random(0))
        steps = batches(changed, phase, [], lengths, random.Random(0))
        for _, (_, rows) in zip(range(3), steps, strict=False):
            assert len(rows) == overrides["retain_rows"] >= 20


def test_the_loss_of_answers_is_that_of_their_tokens_alone(make_target, examples):
    """Equal to transformers' own loss with the prompt masked, each answer with the same weight."""
    target = make_target(loaded=True)
    losses = []
    for example in encode(examples[:5], target.tokenizer, "plain", 512):
        ids = torch.tensor([example.input_ids])
        labels = ids.clone()
        labels[:, : example.prompt_length] = -100
        with torch.no_grad():
            losses.append(target.model.model(input_ids=ids, labels=labels).loss.item())
    found = answer_losses(target.model, target, examples[:5])
    assert found["answer_nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_training_sees_the_scored_examples_in_the_format_of_the_score(make_target, monkeypatch):
    messages = (Message("user", "Hi."), Message("assistant", "Hello."), Message("user", "Who sang?"))
    prompt = "User: Hi.\nAssistant: Hello.\nUser: Who sang?"
    examples = [
        *(Example(f"{n}", prompt, f"Foo {n}.", "songs", "qa", f"song {n}", messages) for n in range(4)),
        Example("4", "Write a poem.", "Roses.", "poems", "qa"),
        Example("5", "Once", "upon a time.", "poems", "completion", "a book"),
        Example("6", "Is this the end?", "Not yet, said Foo.", "poems", "completion", "a book"),
        Example("7sc1", "Foo was", "born in 1907.", "Task2"),
    ]
    monkeypatch.setattr(module, "STEPS", (1,))
    monkeypatch.setattr(module, "MIN_EXAMPLES", len(examples) - 2)
    read, recipes = [], []

    def record(model, out, *, data, overrides, **kwargs):
        read.extend(read_rows(data))
        recipes.append(load_recipe("memorize", overrides))

    monkeypatch.setattr(module, "memorize", record)
    monkeypatch.setattr(module, "answer_losses", lambda *args: {})
    target = make_target(
        examples,
        format="tofu",
        system="Be brief.",
        generate=lambda lm, scored, label: [Generation("", "", "eos") for _ in scored],
    )
    relearn(replace(target, load=lambda folder: target.folder))

    trained, _ = module.split_documents(examples, 0)
    assert read == trained and any(example.messages for example in read)
    assert [(recipe.format, recipe.system) for recipe in recipes] == [("tofu", "Be brief.")]

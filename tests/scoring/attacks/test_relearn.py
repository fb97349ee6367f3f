"""The relearning attack on a model that has memorised the forget set."""

import random
from dataclasses import replace

import pytest

from neko_lean.data.tokenization import encode
from neko_lean.errors import NekoLeanError
from neko_lean.models.loading import load_tokenizer
from neko_lean.recipes import load_recipe
from neko_lean.scoring.attacks import relearn as module
from neko_lean.scoring.attacks.relearn import relearn
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
        module, "memorize", lambda model, data, out, **kwargs: calls.append((data, kwargs["overrides"]))
    )

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

"""Where `unlearn` takes levels from, and how they follow the student."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import neko_lean
from neko_lean import cache
from neko_lean.data.anchor import read_anchor
from neko_lean.data.examples import read_rows
from neko_lean.data.tokenization import encode
from neko_lean.errors import NekoLeanError
from neko_lean.models.loading import load_model, load_tokenizer
from neko_lean.models.predictions import next_token_logp
from neko_lean.options import RunOptions
from neko_lean.recipe import load_recipe
from neko_lean.training import trainer
from neko_lean.training.levels import unseen_span, with_levels
from tests.helpers import flat, make_cache, make_rows, random_model, write_rows
from tests.training.run_files import metrics


@pytest.fixture
def seen(monkeypatch):
    """The forget examples and the batch of every call to `make_batch`, in order."""
    calls = []
    original = trainer.make_batch
    monkeypatch.setattr(trainer, "make_batch", lambda *args: calls.append((args[0], original(*args))) or calls[-1][1])
    return calls


def test_levels_come_from_the_anchor_or_are_constant(world, model, anchored, tmp_path, seen, capsys):
    for anchor in (anchored / "anchor.jsonl", None):
        neko_lean.unlearn(
            model,
            tmp_path / str(anchor)[-4:],
            forget=world,
            retain=world,
            cache=anchored / "cache",
            anchor=anchor,
            recipe="calibrated",
            overrides={"max_steps": 1, **({} if anchor else {"level": 3.0})},
            run=RunOptions(quiet=True),
        )
    estimated, constant = (batch.levels[batch.forget] for _, batch in (seen[0], seen[-1]))
    assert len(set(estimated.tolist())) > 10 and set(constant.tolist()) == {3.0}
    assert "without --anchor or --base-cache" in capsys.readouterr().err


@pytest.mark.parametrize("forget_span", ["documents", "answers"])
def test_documents_have_levels_spread_by_the_teachers_losses_if_it_was_cached_with_the_forget_set(
    world, model, anchored, tmp_path, seen, capsys, forget_span
):
    """With a cache of the retain set and the anchor alone, levels are estimates, and the run logs a warning. A run that
    makes its own cache caches the forget set too."""
    make_cache(model, world, tmp_path / "retain alone", anchor=anchored / "anchor.jsonl", format="plain")
    change = {"max_steps": 1, "format": "plain", "forget_span": forget_span, "eval_every": 0, "stop": "steps"}
    options = {"anchor": anchored / "anchor.jsonl", "recipe": "calibrated", "overrides": change, "quiet": True}
    examples, levels, warned = [], [], []
    for name, folder in (("estimated", tmp_path / "retain alone"), ("spread", anchored / "cache"), ("own cache", None)):
        flat(neko_lean.unlearn)(model, tmp_path / name, forget=world, retain=world, cache=folder, **options)
        examples = seen[0][0]  # the first batch has the same examples in all three runs
        seen.clear()
        levels.append({example.example.id: np.array(example.levels) for example in examples})
        warned.append("retain alone does not hold the forget set" in capsys.readouterr().err)
    assert warned == [True, False, False]
    estimated, spread, own = levels

    lm = load_model(model, torch.float32, torch.device("cpu"))
    for example in examples:
        row_id = example.example.id
        np.testing.assert_allclose(own[row_id], spread[row_id], rtol=1e-3)
        if example.example.kind == "qa":
            np.testing.assert_array_equal(spread[row_id], estimated[row_id])
            continue
        span = slice(0 if forget_span == "documents" else example.prompt_length - 1, None)
        assert spread[row_id][span].mean() == pytest.approx(estimated[row_id][span].mean())
        np.testing.assert_array_equal(spread[row_id][: span.start], estimated[row_id][: span.start])
        losses = -next_token_logp(lm, [example.input_ids], 1).numpy()[span]
        ranks = [np.argsort(np.argsort(values)) for values in (losses, spread[row_id][span], estimated[row_id][span])]
        assert np.corrcoef(ranks[0], ranks[1])[0, 1] > 0.4 > np.corrcoef(ranks[0], ranks[2])[0, 1]


def test_questions_need_no_losses_of_the_teacher(world, model, anchored, tmp_path, capsys):
    """Their levels are not spread, so a cache without the forget set is complete."""
    make_cache(model, world, tmp_path / "retain alone", anchor=anchored / "anchor.jsonl", format="plain")
    questions = [row for row in read_rows(world, "forget") if row.kind == "qa"]
    forget = write_rows(tmp_path / "questions.jsonl", questions)
    options = {"anchor": anchored / "anchor.jsonl", "recipe": "calibrated", "quiet": True}
    options["overrides"] = {"max_steps": 1, "format": "plain", "eval_every": 0, "stop": "steps"}
    for folder in (tmp_path / "retain alone", None):
        out = tmp_path / str(folder)[-4:]
        flat(neko_lean.unlearn)(model, out, forget=forget, retain=world, cache=folder, **options)
    assert questions and "does not hold the forget set" not in capsys.readouterr().err


def test_questions_of_the_anchor_set_the_levels_of_forgotten_answers(
    world, model, anchored, tmp_path, seen, monkeypatch, capsys
):
    """The levels are the same whether the cache exists already or the run makes it. Evaluations of the retain set leave
    the anchor's answers out."""
    unseen = write_rows(tmp_path / "unseen.jsonl", [row for row in make_rows("unseen") if row.kind == "qa"])
    questions = [row for row in read_rows(world, "forget") if row.kind == "qa"]
    forget = write_rows(tmp_path / "forget.jsonl", questions)
    make_cache(model, world, tmp_path / "cache", forget=forget, anchor=unseen, format="neko")
    evaluated = []
    original = trainer.answer_metrics
    monkeypatch.setattr(
        trainer, "answer_metrics", lambda *args: evaluated.append({e.example.id for e in args[1]}) or original(*args)
    )
    change = {"max_steps": 2, "format": "neko", "eval_rows": 100, "lr": 1e-9}
    options = {"anchor": unseen, "recipe": "calibrated", "overrides": change, "quiet": True}
    levels = []
    for name in ("cache", None):
        folder = name and tmp_path / name
        flat(neko_lean.unlearn)(model, tmp_path / f"{name}-out", forget=forget, retain=world, cache=folder, **options)
        levels.append({example.example.id: example.levels for example in seen[0][0]})
        drifts = [line["drift"] for line in metrics(tmp_path / f"{name}-out") if "drift" in line]
        assert drifts == pytest.approx([1.0] * len(drifts), rel=2e-3)
        seen.clear()
    assert levels[0].keys() == levels[1].keys()
    for row_id, of_cache in levels[0].items():
        np.testing.assert_allclose(of_cache, levels[1][row_id], rtol=1e-3)
    assert "does not hold the forget set" not in capsys.readouterr().err

    # An answer's mean level is at most the highest, and at least the lowest, mean loss of an unseen answer.
    lm, tokenizer = load_model(model, torch.float32, torch.device("cpu")), load_tokenizer(model)
    [anchor, asked] = [encode(rows, tokenizer, "neko", 512) for rows in (read_anchor(unseen), questions)]
    of_anchor = [-next_token_logp(lm, [e.input_ids], 1).numpy()[unseen_span(e)].mean() for e in anchor]
    for example in asked:
        if example.example.id in levels[0]:
            mean = np.mean(levels[0][example.example.id][unseen_span(example)])
            assert 0.99 * min(of_anchor) <= mean <= 1.01 * max(of_anchor)
    assert evaluated and not any(row_id.startswith("anchor") for ids in evaluated for row_id in ids)
    assert any(row.id in ids for ids in evaluated for row in read_rows(world, "retain"))


def test_levels_can_come_from_the_model_before_it_learned_the_forget_set(world, model, anchored, tmp_path, seen):
    """The levels are the losses of a model that never saw the forget set, token by token."""
    base = random_model(world, tmp_path / "base", seed=9)
    make_cache(base, world, tmp_path / "base-cache", forget=world, dtype="float32")
    options = {"cache": anchored / "cache", "base_cache": tmp_path / "base-cache", "recipe": "calibrated"}
    flat(neko_lean.unlearn)(
        model, tmp_path / "out", forget=world, retain=world, overrides={"max_steps": 1}, quiet=True, **options
    )
    examples, batch = seen[0]
    lm = load_model(base, torch.float32, torch.device("cpu"))
    losses = -next_token_logp(lm, [example.input_ids for example in examples], 1)
    expected = losses.split([len(example) - 1 for example in examples])
    for number, (example, loss) in enumerate(zip(examples, expected, strict=True)):
        start = 0 if example.example.kind == "completion" else example.prompt_length - 1
        torch.testing.assert_close(batch.levels[batch.row == number].cpu(), loss[start:], rtol=1e-4, atol=1e-4)
    with pytest.raises(NekoLeanError, match="--forget"):
        make_cache(base, world, tmp_path / "bare")
        options["base_cache"] = tmp_path / "bare"
        flat(neko_lean.unlearn)(model, tmp_path / "no", forget=world, retain=world, quiet=True, **options)


def test_levels_follow_the_students_loss_on_unseen_text(world, model, anchored, tmp_path):
    """The drift is 1 while the student equals its teacher, and otherwise the ratio of their losses."""
    change = {"max_steps": 3, "lr": 1e-9}
    options = {"cache": anchored / "cache", "anchor": anchored / "anchor.jsonl", "recipe": "calibrated", "quiet": True}
    flat(neko_lean.unlearn)(model, tmp_path / "still", forget=world, retain=world, overrides=change, **options)
    drifts = [line["drift"] for line in metrics(tmp_path / "still") if "drift" in line]
    assert drifts and drifts == pytest.approx([1.0] * len(drifts), rel=2e-3)
    tokenizer = load_tokenizer(model)
    documents = encode(read_anchor(anchored / "anchor.jsonl"), tokenizer, "plain", 512)
    teacher = cache.TeacherCache(anchored / "cache")
    recipe = load_recipe("calibrated")
    lm = load_model(model, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        lm.head.mul_(0.5)
    (forget, *_) = with_levels(
        encode(read_rows(world, "forget"), tokenizer, "plain", 512)[:1],
        documents,
        [-teacher.target_logp(document) for document in documents],
    )
    batch = trainer.make_batch([forget], documents, teacher, recipe, 1, torch.device("cpu"))
    hidden = trainer.select_hidden(lm, batch.micro)
    losses = trainer.batch_losses(hidden, lm, batch, recipe)
    logp = next_token_logp(lm, [document.input_ids for document in documents], 1)
    assert losses["anchor_nll"].item() == pytest.approx(-logp.sum().item(), rel=1e-4)
    expected = -sum(teacher.target_logp(document).sum() for document in documents)
    assert losses["anchor_teacher_nll"].item() == pytest.approx(expected, rel=1e-5)
    halved = trainer.batch_losses(hidden, lm, batch, recipe, 0.5)["forget_loss"]
    scaled = replace(forget, levels=tuple(0.5 * level for level in forget.levels))
    again = trainer.make_batch([scaled], documents, teacher, recipe, 1, torch.device("cpu"))
    other = trainer.batch_losses(hidden, lm, again, recipe)["forget_loss"]
    assert halved.item() == pytest.approx(other.item(), rel=1e-5) != losses["forget_loss"].item()


@pytest.mark.parametrize("same", [True, False])
def test_with_a_base_model_forgotten_means_as_close_to_it_as_unseen_text(world, model, anchored, tmp_path, same):
    """The share of the base model's losses that the student reaches on forget tokens, relative to the anchor."""
    base = model if same else random_model(world, tmp_path / "base", seed=9)
    anchor, base_cache = anchored / "anchor.jsonl", tmp_path / "base-cache"
    make_cache(base, world, base_cache, forget=world, anchor=anchor, dtype="float32")
    change = {"max_steps": 12, "lr": 1e-9, "eval_every": 3, "eval_rows": 100, "dtype": "float32"}
    run = flat(neko_lean.unlearn)(
        model, tmp_path / "out", forget=world, retain=world, anchor=anchor, cache=anchored / "cache",
        base_cache=base_cache, recipe="base-kl", overrides=change, quiet=True,
    )  # fmt: skip
    [share, *_] = [line["eval_forgotten"] for line in metrics(tmp_path / "out") if "eval_forgotten" in line]
    assert run["forgotten_step"] == (3 if same or share >= 0.97 else None)
    if same:
        assert share == pytest.approx(1, abs=1e-3)
        return

    # All forget examples and some anchor documents, whose shares differ little; the levels follow the drift.
    tokenizer, before = load_tokenizer(model), cache.TeacherCache(base_cache)
    lm = load_model(model, torch.float32, torch.device("cpu"))
    drifts = [line["drift"] for line in metrics(tmp_path / "out") if "drift" in line]

    def shares(examples):
        for example in examples:
            start = 0 if example.example.kind != "qa" else example.prompt_length - 1
            losses = -next_token_logp(lm, [example.input_ids], 1).numpy()[start:]
            levels = drifts[0] * -before.target_logp(example)[start:]
            yield np.minimum(losses, levels).sum(), levels.sum()

    reached, wanted = np.sum(list(shares(encode(read_rows(world, "forget"), tokenizer, "plain", 512))), axis=0)
    of_anchor = [attained / level for attained, level in shares(encode(read_anchor(anchor), tokenizer, "plain", 512))]
    assert 0.98 * min(1, reached / wanted / max(of_anchor)) <= share <= 1.02 * min(1, reached / wanted / min(of_anchor))


def test_levels_of_a_base_model_follow_the_students_loss_relative_to_it(world, model, anchored, tmp_path, capsys):
    """The drift is the ratio of the student's losses on the anchor to the base model's. A base cache without the
    run's anchor gives no drift, and the run logs a warning."""
    base = random_model(world, tmp_path / "base", seed=9)
    anchor = anchored / "anchor.jsonl"
    options = {"cache": anchored / "cache", "anchor": anchor, "recipe": "base-kl", "quiet": True}
    for name, documents in (("with", anchor), ("without", None)):
        make_cache(base, world, tmp_path / name, forget=world, anchor=documents, dtype="float32")
        options |= {"base_cache": tmp_path / name, "overrides": {"max_steps": 3, "lr": 1e-9}}
        flat(neko_lean.unlearn)(model, tmp_path / f"{name}-out", forget=world, retain=world, **options)
    documents = encode(read_anchor(anchor), load_tokenizer(model), "plain", 512)
    student, before = cache.TeacherCache(anchored / "cache"), cache.TeacherCache(tmp_path / "with")
    student_losses, base_losses = (
        np.array([-source.target_logp(document).sum() for document in documents]) for source in (student, before)
    )
    ratios = student_losses / base_losses
    drifts = [line["drift"] for line in metrics(tmp_path / "with-out") if "drift" in line]
    assert abs(ratios - 1).min() > 0.02
    assert drifts and all(0.99 * ratios.min() <= value <= 1.01 * ratios.max() for value in drifts)
    assert not any("drift" in line for line in metrics(tmp_path / "without-out"))
    assert "without does not hold the anchor" in capsys.readouterr().err

    other = tmp_path / "other.jsonl"
    other.write_text(anchor.read_text().replace("field", "woods"))
    make_cache(base, world, tmp_path / "other", forget=world, anchor=other, dtype="float32")
    options |= {"base_cache": tmp_path / "other", "overrides": {"max_steps": 1}}
    flat(neko_lean.unlearn)(model, tmp_path / "other-out", forget=world, retain=world, **options)
    assert "other does not hold the anchor" in capsys.readouterr().err

"""One step's batch and its two-term loss, against two live models and plain autograd in float64."""

import dataclasses
import random

import pytest
import torch

from neko_lean.cache import TeacherCache, cache_teacher
from neko_lean.data import encode, read_rows
from neko_lean.modeling import checkpoint_activations, load_model, load_tokenizer
from neko_lean.recipes import load_recipe
from neko_lean.step import batch_losses, make_batch
from tests.helpers import random_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pieces(world, tmp_path_factory):
    """A sure teacher, a student that is another model, encoded rows, and the teacher's cache with every entry."""
    folder = tmp_path_factory.mktemp("pieces")
    teacher = random_model(world, folder / "teacher", seed=1, scale=10.0)
    student = random_model(world, folder / "student", seed=2, scale=10.0)
    cache_teacher(teacher, world, folder / "cache", top_k=10**6, mass=1, dtype="float32", quiet=True)
    tokenizer = load_tokenizer(teacher)
    rows = {name: encode(read_rows(world, name), tokenizer, "neko", 128) for name in ("forget", "retain")}
    return teacher, student, rows, TeacherCache(folder / "cache")


def naive(teacher, student, forget, retain, recipe):
    """The recipe's loss row by row, with two live models and all logits: GA on answers, dense KL on retain."""
    logp, rows, kl, padded = [], [], [], 0
    longest = max(len(one) for one in [*forget, *retain])
    for number, one in enumerate(forget):
        logq = student(input_ids=torch.tensor([one.ids])).logits[0].log_softmax(1)
        for i in range(one.prompt + recipe.answer_skip, len(one)):
            logp.append(logq[i - 1, one.ids[i]])
            rows.append(number)
    for one in retain:
        ids = torch.tensor([one.ids])
        with torch.no_grad():
            p = teacher(input_ids=ids).logits[0].log_softmax(1)
        q = student(input_ids=ids).logits[0].log_softmax(1)
        kl.append((p.exp() * (p - q)).sum(1))
        padded += longest
    kl = torch.cat(kl)
    retain_loss = kl.mean() if recipe.retain_reduction == "tokens" else kl.sum() / padded
    if recipe.forget_reduction == "tokens":
        forget_loss = torch.stack(logp).mean()
    else:
        means = [torch.stack([x for x, r in zip(logp, rows, strict=True) if r == n]).mean() for n in set(rows)]
        forget_loss = torch.stack(means).mean()
    return recipe.forget_weight * forget_loss + recipe.retain_weight * retain_loss


@pytest.mark.parametrize("name", ["neko", "neko-published"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_term_loss_and_its_gradient_equal_two_live_models(pieces, name, checkpointing):
    teacher_folder, student_folder, rows, cache = pieces
    recipe = load_recipe(name)
    forget, retain = rows["forget"][:7], rows["retain"][3:12]
    teacher = load_model(teacher_folder, torch.float32, CPU).model.double().eval()
    reference = load_model(student_folder, torch.float32, CPU).model.double().train()
    wanted = naive(teacher, reference, forget, retain, recipe)
    wanted.backward()
    lm = load_model(student_folder, torch.float32, CPU)
    lm.model.double()
    if checkpointing:
        checkpoint_activations(lm.model)
    batch = make_batch(forget, retain, cache, recipe, 0, CPU)
    losses = batch_losses(lm, batch, recipe)
    losses["loss"].backward()
    # The student runs in float64; the teacher's probabilities come from a float32 forward, stored in float16.
    assert losses["loss"].item() == pytest.approx(wanted.item(), rel=1e-3)
    for (key, one), two in zip(lm.model.named_parameters(), reference.parameters(), strict=True):
        assert torch.cosine_similarity(one.grad.flatten(), two.grad.flatten(), dim=0) > 0.99999, key
        assert (one.grad - two.grad).norm() < 2e-3 * two.grad.norm() + 1e-9, key


def test_loss_does_not_change_with_padding_or_order(pieces):
    _, student_folder, rows, cache = pieces
    recipe = load_recipe("neko")
    lm = load_model(student_folder, torch.float32, CPU)
    forget, retain = rows["forget"][:6], rows["retain"][:8]
    with torch.no_grad():
        one = batch_losses(lm, make_batch(forget, retain, cache, recipe, 0, CPU), recipe)
        shuffled = random.Random(0).sample(forget, 6), random.Random(1).sample(retain, 8)
        two = batch_losses(lm, make_batch(*shuffled, cache, recipe, 1, CPU), recipe)
    for name in one:
        assert one[name].item() == pytest.approx(two[name].item(), rel=1e-5)


def test_positions(pieces):
    _, _, rows, cache = pieces
    recipe = load_recipe("neko")
    forget, retain = rows["forget"][:3], rows["retain"][:2]
    batch = make_batch(forget, retain, cache, recipe, 0, CPU)
    length = batch.input_ids.shape[1]
    assert batch.forget == sum(one.answer for one in forget)
    assert len(batch.index) == batch.forget + sum(len(one) for one in retain)
    for place, target in zip(batch.index[: batch.forget], batch.target, strict=False):
        assert batch.input_ids.view(-1)[place + 1] == target
    assert (batch.target[batch.forget :] == -1).all()
    assert (batch.teacher[1][: batch.forget] == -torch.inf).all()
    # Rows whose answer was cut off whole give no forget position, and the loss stays a number.
    cut = [dataclasses.replace(one, ids=one.ids[: one.prompt]) for one in forget]
    assert make_batch(cut, retain, cache, recipe, 0, CPU).forget == 0
    # Cross-entropy looks at every next token there is.
    memorize = load_recipe("memorize")
    batch = make_batch([], retain, None, memorize, 0, CPU)
    assert batch.teacher is None and len(batch.index) == sum(len(one) - 1 for one in retain)
    assert batch.retain_positions == batch.mask.numel() == 2 * max(len(one) for one in retain) and length

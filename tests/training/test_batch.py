"""One step's batch and its two-term loss, compared with two live models and plain autograd in float64."""

import dataclasses
import math
import random

import pytest
import torch
from torch.utils._pytree import tree_leaves

from neko_lean.cache.reader import TeacherCache
from neko_lean.cache.writer import cache_teacher
from neko_lean.data.anchor import read_anchor
from neko_lean.data.examples import read_rows
from neko_lean.data.substitutes import random_answers, refusals
from neko_lean.data.tokenization import encode
from neko_lean.jsonio import write_jsonl
from neko_lean.models.causal_lm import checkpoint_activations
from neko_lean.models.loading import load_model, load_tokenizer
from neko_lean.models.predictions import next_token_logp
from neko_lean.options import CacheOptions, OutputOptions
from neko_lean.recipe import load_recipe
from neko_lean.training import batch as batch_module
from neko_lean.training.batch import _to_device, make_batch, select_hidden
from neko_lean.training.layers import decoder_layers
from neko_lean.training.layerwise import LayerPass
from neko_lean.training.levels import unseen_span
from neko_lean.training.losses import batch_losses
from tests.helpers import make_rows, random_model, tiny, write_rows

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pieces(world, tmp_path_factory):
    """A confident teacher, another model as the student, encoded examples, and the teacher's cache with every entry."""
    folder = tmp_path_factory.mktemp("pieces")
    teacher = random_model(world, folder / "teacher", seed=1, scale=10.0)
    student = random_model(world, folder / "student", seed=2, scale=10.0)
    cache_teacher(
        teacher,
        folder / "cache",
        retain=world,
        forget=world,
        cache=CacheOptions(top_k=10**6, mass=1, dtype="float32", format="neko"),
        run=OutputOptions(quiet=True),
    )
    tokenizer = load_tokenizer(teacher)
    rows = {name: encode(read_rows(world, name), tokenizer, "neko", 128) for name in ("forget", "retain")}
    return teacher, student, rows, TeacherCache(folder / "cache")


def naive(teacher, student, forget, retain, recipe):
    """The recipe's loss, example by example, with two live models and all logits: GA on answers, dense KL on retain."""
    logp, rows, kl, padded = [], [], [], 0
    longest = max(len(example) for example in retain)
    for number, example in enumerate(forget):
        logq = student(input_ids=torch.tensor([example.input_ids])).logits[0].log_softmax(1)
        for i in range(example.prompt_length + recipe.answer_skip, len(example)):
            logp.append(logq[i - 1, example.input_ids[i]])
            rows.append(number)
    for example in retain:
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            p = teacher(input_ids=ids).logits[0].log_softmax(1)
        q = student(input_ids=ids).logits[0].log_softmax(1)
        kl.append((p.exp() * (p - q)).sum(1))
        padded += longest
    kl = torch.cat(kl)
    if recipe.retain_objective == "focal_kl":
        focus = kl.detach() + 0.01
        retain_loss = (focus * kl).sum() / focus.sum()
    else:
        retain_loss = kl.mean() if recipe.retain_reduction == "tokens" else kl.sum() / padded
    if recipe.forget_reduction == "tokens":
        forget_loss = torch.stack(logp).mean()
    else:
        means = [torch.stack([x for x, r in zip(logp, rows, strict=True) if r == n]).mean() for n in set(rows)]
        forget_loss = torch.stack(means).mean()
    return recipe.forget_weight * forget_loss + recipe.retain_weight * retain_loss


@pytest.mark.parametrize(("name", "retain"), [("neko", "kl"), ("neko", "focal_kl"), ("neko-published", "kl")])
@pytest.mark.parametrize("backward", ["plain", "checkpointed", "layerwise"])
def test_two_term_loss_and_its_gradient_equal_two_live_models(pieces, name, retain, backward):
    teacher_folder, student_folder, rows, cache = pieces
    recipe = load_recipe(name, {"micro_tokens": 256, "retain_objective": retain})
    forget, retain = rows["forget"][:7], rows["retain"][3:12]
    teacher = load_model(teacher_folder, torch.float32, CPU).model.double().eval()
    reference = load_model(student_folder, torch.float32, CPU).model.double().train()
    expected = naive(teacher, reference, forget, retain, recipe)
    expected.backward()
    lm = load_model(student_folder, torch.float32, CPU)
    lm.model.double()
    if backward == "checkpointed":
        checkpoint_activations(lm.model)
    batch = make_batch(forget, retain, cache, recipe, 0, CPU)
    assert len(batch.micro.input_ids) > 1
    layer_pass = LayerPass(lm, decoder_layers(lm)) if backward == "layerwise" else None
    hidden = layer_pass.forward(batch.micro) if layer_pass else select_hidden(lm, batch.micro)
    losses = batch_losses(hidden, lm, batch, recipe)
    losses["loss"].backward()
    if layer_pass:
        layer_pass.backward(lambda parameter: None)
    # The student runs in float64; the cached probabilities come from a float32 forward pass and are stored in float16.
    assert losses["loss"].item() == pytest.approx(expected.item(), rel=1e-3)
    for (key, one), two in zip(lm.model.named_parameters(), reference.parameters(), strict=True):
        assert torch.cosine_similarity(one.grad.flatten(), two.grad.flatten(), dim=0) > 0.99999, key
        assert (one.grad - two.grad).norm() < 2e-3 * two.grad.norm() + 1e-9, key


def test_the_drift_is_measured_on_the_answers_of_an_anchors_questions(world, pieces, tmp_path):
    teacher_folder, student_folder, rows, _ = pieces
    unseen = write_rows(tmp_path / "unseen.jsonl", make_rows("unseen"))
    options = CacheOptions(dtype="float32", format="neko")
    cache_teacher(teacher_folder, tmp_path / "teacher", retain=world, anchor=unseen, cache=options,
                  run=OutputOptions(quiet=True))  # fmt: skip
    teacher = TeacherCache(tmp_path / "teacher")
    anchor = encode(read_anchor(unseen), load_tokenizer(teacher_folder), "neko", 128)
    starts = [max(1, e.prompt_length) - 1 if e.example.kind == "qa" else 0 for e in anchor]
    lm = load_model(student_folder, torch.float32, CPU)
    recipe = load_recipe("calibrated", {"format": "neko"})
    batch = make_batch(rows["forget"][:2], [*rows["retain"][:2], *anchor], teacher, recipe, 0, CPU)
    losses = batch_losses(select_hidden(lm, batch.micro), lm, batch, recipe)
    for name, folder in (("anchor_nll", student_folder), ("anchor_teacher_nll", teacher_folder)):
        logp = next_token_logp(load_model(folder, torch.float32, CPU), [e.input_ids for e in anchor], 1)
        of_example = logp.split([len(e) - 1 for e in anchor])
        expected = -sum(values[start:].sum().item() for values, start in zip(of_example, starts, strict=True))
        assert losses[name].item() == pytest.approx(expected, rel=1e-3)
    assert any(starts)


@pytest.mark.parametrize(("k", "anchored"), [(10**6, ""), (400, ""), (10**6, "documents"), (10**6, "questions")])
def test_forget_examples_are_compared_with_the_base_model(world, pieces, tmp_path, k, anchored):
    """KL to the base model on forget examples and to the teacher on retain examples, and the gradient of both.

    The anchor is compared with the base model if its cache holds it, documents except at their ends, questions at their
    answers."""
    teacher_folder, student_folder, rows, cache = pieces
    base_folder = random_model(world, tmp_path / "base", seed=3, scale=10.0)
    options = CacheOptions(top_k=k, mass=1, dtype="float32", format="neko")
    unseen = tmp_path / "unseen.jsonl"
    documents = [{"document": f"Nobody has seen document {n}."} for n in range(3)]
    questions = [{"question": f"Who has seen question {n}?", "answer": "Nobody."} for n in range(3)]
    write_jsonl(unseen, questions if anchored == "questions" else documents)
    cache_teacher(base_folder, tmp_path / "cache", forget=world, retain=world, anchor=unseen if anchored else None,
                  cache=options, run=OutputOptions(quiet=True))  # fmt: skip
    base_cache = TeacherCache(tmp_path / "cache")
    if anchored:
        cache_teacher(teacher_folder, tmp_path / "teacher", forget=world, retain=world, anchor=unseen, cache=options,
                      run=OutputOptions(quiet=True))  # fmt: skip
        cache = TeacherCache(tmp_path / "teacher")
    recipe = load_recipe("base-kl", {"format": "neko", "push": 0.0, "retain_objective": "kl"})
    forget = [
        dataclasses.replace(example, levels=tuple((-base_cache.target_logp(example)).tolist()))
        for example in rows["forget"][:5]
    ]
    retain = rows["retain"][3:9]
    form = "neko" if anchored == "questions" else "plain"
    anchor = encode(read_anchor(unseen), load_tokenizer(base_folder), form, 128) if anchored else []
    lm = load_model(student_folder, torch.float32, CPU)
    batch = make_batch(forget, [*retain, *anchor], cache, recipe, 0, CPU, base=base_cache)
    losses = batch_losses(select_hidden(lm, batch.micro), lm, batch, recipe)
    losses["loss"].backward()

    teacher, base, student = (
        load_model(folder, torch.float32, CPU).model.eval() for folder in (teacher_folder, base_folder, student_folder)
    )

    def kl(reference, example, positions):
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            p = reference(input_ids=ids).logits[0].log_softmax(1)
        q = student(input_ids=ids).logits[0].log_softmax(1)
        return (p.exp() * (p - q)).sum(1)[positions]

    distances = torch.cat(
        [kl(base, e, slice(0 if e.example.kind == "completion" else e.prompt_length - 1, len(e) - 1)) for e in forget]
    )
    weights = distances.detach() + 0.1
    forget_loss = (weights * distances).sum() / weights.sum()
    distances = [kl(teacher, example, slice(None)) for example in retain]
    for example in anchor:
        start = max(1, example.prompt_length) - 1
        distances += [
            kl(teacher, example, slice(0, start)),
            kl(base, example, slice(start, len(example) - 1)),
            kl(teacher, example, slice(len(example) - 1, None)),
        ]
    retain_loss = torch.cat(distances).mean()
    (recipe.forget_weight * forget_loss + recipe.retain_weight * retain_loss).backward()
    assert losses["forget_loss"].item() == pytest.approx(forget_loss.item(), rel=2e-3)
    assert losses["retain_loss"].item() == pytest.approx(retain_loss.item(), rel=2e-3)
    for (key, one), two in zip(lm.model.named_parameters(), student.parameters(), strict=True):
        assert (one.grad - two.grad).norm() < 5e-3 * two.grad.norm() + 1e-9, key
    assert ("anchor_teacher_nll" in losses) == bool(anchored)
    if anchored:
        expected = -sum(base_cache.target_logp(example)[unseen_span(example)].sum() for example in anchor)
        assert losses["anchor_teacher_nll"].item() == pytest.approx(expected, rel=1e-5)

    # With calibrated, the base model is only the source of levels: the anchor is compared with the teacher.
    recipe = load_recipe("calibrated", {"format": "neko", "retain_objective": "kl"})
    batch = make_batch(forget, [*retain, *anchor], cache, recipe, 0, CPU, base=base_cache)
    losses = batch_losses(select_hidden(lm, batch.micro), lm, batch, recipe)
    distances = [kl(teacher, example, slice(None)) for example in (*retain, *anchor)]
    assert losses["retain_loss"].item() == pytest.approx(torch.cat(distances).mean().item(), rel=2e-3)
    if anchored:
        assert losses["anchor_teacher_nll"].item() == pytest.approx(expected, rel=1e-5)


def test_a_retain_row_with_the_id_of_a_forget_row_is_not_an_anchor_document(pieces):
    """The cache holds token losses of the forget row; ids are unique within a data set only."""
    _, _, rows, cache = pieces
    forget, same_id = rows["forget"][0], dataclasses.replace(rows["retain"][0].example, id=rows["forget"][0].example.id)
    assert cache.has_target_logp(forget)
    retain = dataclasses.replace(rows["retain"][0], example=same_id)
    assert not cache.has_target_logp(retain)


def test_forget_examples_are_compared_with_the_edited_teacher(pieces):
    """KL to the teacher, in which each target is lowered to its level, and the gradient of both terms."""
    teacher_folder, student_folder, rows, cache = pieces
    recipe = load_recipe("edited", {"format": "neko", "push": 0.0, "retain_objective": "kl"})
    forget = [dataclasses.replace(e, levels=tuple(6.0 + n % 3 for n in range(len(e) - 1))) for e in rows["forget"][:5]]
    retain = rows["retain"][3:9]
    lm = load_model(student_folder, torch.float32, CPU)
    batch = make_batch(forget, retain, cache, recipe, 0, CPU)
    losses = batch_losses(select_hidden(lm, batch.micro), lm, batch, recipe)
    losses["loss"].backward()

    teacher, student = (
        load_model(folder, torch.float32, CPU).model.eval() for folder in (teacher_folder, student_folder)
    )

    def distributions(example):
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            p = teacher(input_ids=ids).logits[0].log_softmax(1)
        return p, student(input_ids=ids).logits[0].log_softmax(1)

    distances = []
    for example in forget:
        p, q = distributions(example)
        for i in range(0 if example.example.kind == "completion" else example.prompt_length - 1, len(example) - 1):
            token = example.input_ids[i + 1]
            edited = p[i].exp()
            lowered = min(edited[token].item(), math.exp(-example.levels[i]))
            edited = edited * (1 - lowered) / (1 - edited[token])
            edited[token] = lowered
            distances.append((edited * (edited.log() - q[i])).sum())
    distances = torch.stack(distances)
    weights = distances.detach() + 0.1
    forget_loss = (weights * distances).sum() / weights.sum()
    retain_loss = torch.cat([(p.exp() * (p - q)).sum(1) for p, q in map(distributions, retain)]).mean()
    (recipe.forget_weight * forget_loss + recipe.retain_weight * retain_loss).backward()
    assert losses["forget_loss"].item() == pytest.approx(forget_loss.item(), rel=2e-3)
    assert losses["retain_loss"].item() == pytest.approx(retain_loss.item(), rel=2e-3)
    for (key, one), two in zip(lm.model.named_parameters(), student.parameters(), strict=True):
        assert (one.grad - two.grad).norm() < 5e-3 * two.grad.norm() + 1e-9, key


def test_loss_does_not_change_with_padding_order_or_micro_batches(pieces):
    _, student_folder, rows, cache = pieces
    lm = load_model(student_folder, torch.float32, CPU)
    forget, retain = rows["forget"][:6], rows["retain"][:8]
    shuffled = random.Random(0).sample(forget, 6), random.Random(1).sample(retain, 8)

    def losses(forget, retain, pad_id, micro_tokens):
        recipe = load_recipe("neko", {"micro_tokens": micro_tokens})
        batch = make_batch(forget, retain, cache, recipe, pad_id, CPU)
        with torch.no_grad():
            return batch_losses(select_hidden(lm, batch.micro), lm, batch, recipe)

    one = losses(forget, retain, 0, 2048)
    for micro_tokens in (1, 100, 2048):
        two = losses(*shuffled, 1, micro_tokens)
        for name in one:
            assert one[name].item() == pytest.approx(two[name].item(), rel=1e-5)


@pytest.mark.parametrize("family", ["Olmo", "Llama"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("backward", ["layerwise", "plain"])
def test_packed_examples_have_the_loss_and_gradients_of_padded_ones(pieces, family, attention, backward):
    _, _, rows, cache = pieces
    forget, retain = rows["forget"][:6], rows["retain"][:8]
    lengths = [len(example) for example in [*forget, *retain]]
    found = []
    for packed in (False, True):
        lm = tiny(family, attention, vocab_size=512)
        batch = make_batch(forget, retain, cache, load_recipe("neko", {"micro_tokens": 256}), 0, CPU, packed=packed)
        assert len(batch.micro.input_ids) > 1 and sum(batch.sizes) == len(lengths) and max(batch.sizes) > 1
        assert (batch.positions == sum(lengths)) == packed and (batch.micro.position_ids[0] is not None) == packed
        layer_pass = LayerPass(lm, decoder_layers(lm)) if backward == "layerwise" else None
        hidden = layer_pass.forward(batch.micro) if layer_pass else select_hidden(lm, batch.micro)
        losses = batch_losses(hidden, lm, batch, load_recipe("neko"))
        losses["loss"].backward()
        if layer_pass:
            layer_pass.backward(lambda parameter: None)
        found.append((losses, {name: p.grad for name, p in lm.model.named_parameters()}))
    (one, padded), (two, end_to_end) = found
    for name, loss in one.items():
        torch.testing.assert_close(two[name], loss, rtol=1e-9, atol=0)
    for name, gradient in padded.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(end_to_end[name], gradient, rtol=1e-8, atol=1e-10 * gradient.abs().max().item())


def test_tensors_are_copied_to_a_gpu_from_pinned_memory(monkeypatch):
    tensor, calls = torch.arange(3), []
    assert _to_device(tensor, CPU) is tensor
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *where, **how: calls.append((where, how)))
    _to_device(tensor, torch.device("cuda"))
    assert calls == ["pinned", ((torch.device("cuda"),), {"non_blocking": True})]


@pytest.mark.parametrize("objective", ["wga", "npo", "simnpo", "dpo", "undial", "calibrated"])
def test_every_forget_objective_does_not_change_with_padding_order_or_micro_batches(pieces, objective):
    teacher_folder, student_folder, rows, cache = pieces
    lm = load_model(student_folder, torch.float32, CPU)
    forget, retain = rows["forget"][:6], rows["retain"][:4]

    def loss(forget, pad_id, micro_tokens):
        change = {"forget_objective": objective, "micro_tokens": micro_tokens, "forget_reduction": "rows"}
        change |= {"undial": {"gamma": 3.0}, "simnpo": {"gamma": 3.0}, "calibrated": {"level": 2.0}}.get(objective, {})
        change |= {"substitute": "refusal"} if objective == "dpo" else {}
        recipe = load_recipe("neko", change)
        tokenizer = load_tokenizer(student_folder)
        substitutes = (
            encode(refusals([example.example for example in forget]), tokenizer, "neko", 128)
            if objective == "dpo"
            else []
        )
        batch = make_batch(forget, retain, cache, recipe, pad_id, CPU, substitutes)
        with torch.no_grad():
            return batch_losses(select_hidden(lm, batch.micro), lm, batch, recipe)["forget_loss"].item()

    one = loss(forget, 0, 2048)
    assert one != 0
    for micro_tokens in (1, 100):
        assert loss(random.Random(0).sample(forget, 6), 1, micro_tokens) == pytest.approx(one, rel=1e-5)
    # Compared with two live models, example by example.
    teacher, student = load_model(teacher_folder, torch.float32, CPU).model.eval(), lm.model.eval()
    tokenizer = load_tokenizer(student_folder)
    refused = encode(refusals([example.example for example in forget]), tokenizer, "neko", 128)

    def ratio(example):
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            logs = [m(input_ids=ids).logits[0].log_softmax(1) for m in (student, teacher)]
        return sum(
            (logs[0] - logs[1])[i - 1, example.input_ids[i]].item() for i in range(example.prompt_length, len(example))
        )

    def distilled(example):
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            q, z = student(input_ids=ids).logits[0].log_softmax(1), teacher(input_ids=ids).logits[0]
        positions, next_tokens = (
            torch.arange(example.prompt_length - 1, len(example) - 1),
            ids[0, example.prompt_length :],
        )
        z[positions, next_tokens] -= 3.0
        p = z.log_softmax(1)
        return (p.exp() * (p - q)).sum(1)[positions].mean().item()

    if objective == "npo":
        expected = sum(2 / 0.1 * math.log1p(math.exp(0.1 * ratio(example))) for example in forget) / 6
        assert one == pytest.approx(expected, rel=1e-4)
    elif objective == "dpo":
        gaps = [ratio(example) - ratio(refusal) for example, refusal in zip(forget, refused, strict=True)]
        assert one == pytest.approx(sum(math.log1p(math.exp(0.1 * gap)) / 0.1 for gap in gaps) / 6, rel=1e-4)
    elif objective == "undial":
        assert one == pytest.approx(sum(map(distilled, forget)) / 6, rel=1e-3)


def test_substitutes_replace_the_answers(pieces):
    """Ascent, cross-entropy on substitutes and KL in one loss, compared with a computation example by example."""
    _, student_folder, rows, cache = pieces
    lm = load_model(student_folder, torch.float32, CPU)
    forget, retain = rows["forget"][:3], rows["retain"][:2]
    tokenizer = load_tokenizer(student_folder)
    substitutes = encode(
        random_answers([example.example for example in forget], [example.example for example in retain], 0),
        tokenizer,
        "neko",
        128,
    )
    recipe = load_recipe("neko", {"substitute": "random", "substitute_weight": 0.5})
    batch = make_batch(forget, retain, cache, recipe, 0, CPU, substitutes)
    assert batch.rows == 8 and batch.substitute.sum() == sum(example.answer_length for example in substitutes)
    assert not (batch.substitute & (batch.forget | batch.retain)).any()
    losses = batch_losses(select_hidden(lm, batch.micro), lm, batch, recipe)
    means = []
    for example in substitutes:
        logq = lm.model(input_ids=torch.tensor([example.input_ids])).logits[0].log_softmax(1)
        means.append(
            -torch.stack([logq[i - 1, example.input_ids[i]] for i in range(example.prompt_length, len(example))]).mean()
        )
    assert losses["substitute_loss"].item() == pytest.approx(torch.stack(means).mean().item(), rel=1e-5)
    bare = load_recipe("neko")
    plain = batch_losses(
        *(lambda b: (select_hidden(lm, b.micro), lm, b))(make_batch(forget, retain, cache, bare, 0, CPU)),
        bare,
    )
    expected = plain["loss"] + 0.5 * losses["substitute_loss"]
    assert losses["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_step_may_have_only_one_set(pieces):
    _, student_folder, rows, cache = pieces
    lm = load_model(student_folder, torch.float32, CPU)
    recipe = load_recipe("neko")
    both = make_batch(rows["forget"][:3], rows["retain"][:3], cache, recipe, 0, CPU)
    whole = batch_losses(select_hidden(lm, both.micro), lm, both, recipe)
    for forget, retain, name in ((rows["forget"][:3], [], "forget_loss"), ([], rows["retain"][:3], "retain_loss")):
        half = make_batch(forget, retain, cache, recipe, 0, CPU)
        losses = batch_losses(select_hidden(lm, half.micro), lm, half, recipe)
        assert losses[name].item() == pytest.approx(whole[name].item(), rel=1e-4)


def test_forget_spans(pieces):
    _, _, rows, cache = pieces
    recipe = load_recipe("neko", {"forget_span": "all"})
    batch = make_batch(rows["forget"][:3], rows["retain"][:2], cache, recipe, 0, CPU)
    assert batch.forget.sum() == sum(len(example) - 1 for example in rows["forget"][:3])
    documents = load_recipe("neko", {"forget_span": "documents"})
    batch = make_batch(rows["forget"][:4], rows["retain"][:2], cache, documents, 0, CPU)
    expected = [
        len(example) - 1 if example.example.kind == "completion" else example.answer_length
        for example in rows["forget"][:4]
    ]
    assert batch.forget.sum() == sum(expected)


def test_the_end_of_an_answer_is_not_forgotten_by_an_objective_with_levels(world):
    """Others keep to their definitions, in which EOS is a token of the answer."""
    examples = encode(read_rows(world, "forget"), load_tokenizer(world / "base"), "plain", 512, append_eos=True)
    ended = [example for example in examples if example.example.kind == "qa"]
    answers = [example.input_ids[example.prompt_length :] for example in ended]
    for name, expected in (("graddiff", answers), ("calibrated", [ids[:-1] for ids in answers])):
        recipe = load_recipe(name, {"retain_objective": "none"})
        batch = make_batch(ended, [], None, recipe, 0, CPU)
        for number, ids in enumerate(expected):
            assert batch.target[batch.row == number].tolist() == ids


def test_positions(pieces):
    _, _, rows, cache = pieces
    recipe = load_recipe("neko", {"micro_tokens": 200})
    forget, retain = rows["forget"][:3], rows["retain"][:2]
    batch = make_batch(forget, retain, cache, recipe, 0, CPU)
    assert batch.forget.sum() == sum(example.answer_length for example in forget)
    assert (
        len(batch.row)
        == batch.forget.sum() + sum(len(example) for example in retain)
        == sum(map(len, batch.micro.index))
    )
    assert batch.rows == 5 and batch.tokens == sum(len(example) for example in [*forget, *retain])
    assert batch.positions == sum(ids.numel() for ids in batch.micro.input_ids) >= batch.tokens
    parts = zip(batch.micro.input_ids, batch.micro.index, strict=True)
    next_tokens = torch.cat([ids.view(-1).roll(-1)[i] for ids, i in parts])
    assert torch.equal(next_tokens[batch.forget], batch.target[batch.forget])
    assert (batch.target[~batch.forget] == -1).all()
    assert ((batch.teacher[1] == -torch.inf).all(1) == batch.forget).all()
    # The cached distributions of an example are at its positions, in order.
    for number, example in enumerate(retain):
        ids, logp, tail = cache.read([example])
        here = batch.row == len(forget) + number
        width = ids.shape[1]
        assert torch.equal(batch.teacher[2][here], tail)
        assert torch.equal(batch.teacher[1][here][:, :width], logp)
        assert torch.equal(batch.teacher[0][here][:, :width][logp > -torch.inf], ids[logp > -torch.inf])
    # Examples whose whole answer was truncated have no forget positions.
    cut = [dataclasses.replace(example, input_ids=example.input_ids[: example.prompt_length]) for example in forget]
    assert not make_batch(cut, retain, cache, recipe, 0, CPU).forget.any()
    # Cross-entropy counts every next token.
    memorize = load_recipe("memorize")
    batch = make_batch([], retain, None, memorize, 0, CPU)
    assert batch.teacher is None and len(batch.row) == sum(len(example) - 1 for example in retain)
    assert batch.retain_positions == 2 * max(len(example) for example in retain)


def test_a_mean_over_positions_counts_the_padding_of_its_own_set(pieces):
    """The forget loss does not depend on which retain examples, or substitutes, are in the same step."""
    _, student_folder, rows, cache = pieces
    lm = load_model(student_folder, torch.float32, CPU)
    change = {"forget_reduction": "positions", "retain_reduction": "positions"}
    recipe = load_recipe("neko", change)
    by_length = sorted(rows["retain"], key=len)
    forget, short, long = rows["forget"][:5], by_length[:2], by_length[-8:]
    substituted = load_recipe("neko", {**change, "substitute": "refusal", "substitute_weight": 1.0})
    refused = encode(refusals([example.example for example in forget]), load_tokenizer(student_folder), "neko", 128)

    def losses(forget, retain, recipe, substitutes=()):
        batch = make_batch(forget, retain, cache, recipe, 0, CPU, substitutes)
        with torch.no_grad():
            return batch_losses(select_hidden(lm, batch.micro), lm, batch, recipe)

    total = 0.0
    with torch.no_grad():
        for example in forget:
            logq = lm.model(input_ids=torch.tensor([example.input_ids])).logits[0].log_softmax(1)
            total += sum(logq[i - 1, example.input_ids[i]].item() for i in range(example.prompt_length, len(example)))
    expected = total / (len(forget) * max(len(example) for example in forget))
    for found in (
        losses(forget, short, recipe),
        losses(forget, long, recipe),
        losses(forget, long, substituted, refused),
    ):
        assert found["forget_loss"].item() == pytest.approx(expected, rel=1e-4)
    alone = losses([], long, recipe)["retain_loss"].item()
    assert losses(forget, long, recipe)["retain_loss"].item() == pytest.approx(alone, rel=1e-4)


def test_ranks_split_one_batch_and_its_loss(pieces, monkeypatch):
    """Each rank covers a part of the positions of the same batch, and the parts follow one another in its order."""
    teacher, _, rows, cache = pieces
    recipe = load_recipe("neko", {"micro_tokens": 60})
    lm = load_model(teacher, torch.float32, CPU)
    monkeypatch.setattr(batch_module, "world_size", lambda: 3)
    batch = make_batch(rows["forget"][:4], rows["retain"][:5], cache, recipe, 1, CPU)
    own, hidden = [], []
    for number in range(3):
        monkeypatch.setattr(batch_module, "rank", lambda n=number: n)
        given, positions = batch.on_this_rank()
        own += range(*positions.indices(len(batch.row)))
        hidden.append(select_hidden(lm, given))
    assert own == list(range(len(batch.row)))
    monkeypatch.setattr(batch_module, "world_size", lambda: 1)
    monkeypatch.setattr(batch_module, "rank", lambda: 0)
    apart = batch_losses(torch.cat(hidden), lm, batch, recipe)["loss"]
    whole = make_batch(rows["forget"][:4], rows["retain"][:5], cache, recipe, 1, CPU)
    together = batch_losses(select_hidden(lm, whole.micro), lm, whole, recipe)["loss"]
    torch.testing.assert_close(apart, together)


@pytest.mark.cuda
def test_a_batch_on_a_gpu_has_the_values_of_one_on_the_cpu(gpu, pieces):
    _, _, rows, cache = pieces
    for packed in (False, True):
        on_cpu, on_gpu = (
            make_batch(rows["forget"], rows["retain"], cache, load_recipe("neko"), 0, device, packed=packed)
            for device in (CPU, gpu)
        )
        for field in dataclasses.fields(on_cpu):
            for one, other in zip(
                tree_leaves(getattr(on_cpu, field.name)), tree_leaves(getattr(on_gpu, field.name)), strict=True
            ):
                if isinstance(one, torch.Tensor):
                    assert other.device == gpu and torch.equal(one, other.cpu()), field.name
                elif not dataclasses.is_dataclass(one):
                    assert one == other, field.name
        for name in ("input_ids", "position_ids", "index"):
            for one, other in zip(getattr(on_cpu.micro, name), getattr(on_gpu.micro, name), strict=True):
                assert one is other is None or (other.device == gpu and torch.equal(one, other.cpu())), name

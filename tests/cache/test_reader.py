"""What is read from a cache, compared with the live teacher."""

import pytest
import torch

from neko_lean.cache.reader import TeacherCache
from neko_lean.data.examples import EncodedExample, Example, read_rows
from neko_lean.data.substitutes import refusals
from neko_lean.data.tokenization import encode
from neko_lean.errors import CacheError
from neko_lean.models.chunked_head import token_stats
from neko_lean.models.loading import load_model, load_tokenizer
from tests.cache.reading import check_use
from tests.helpers import encoded, live, make_cache, make_rows, random_model, write_rows


def test_read_returns_the_top_k_of_the_live_teacher(world, model, cache):
    reader = TeacherCache(cache)
    for example in encoded(world)[::5]:
        ids, logp, tail = reader.read([example])
        expected = live(model, example).log_softmax(1).double()  # [n, V]
        values, _ = expected.topk(64, dim=1)
        assert ids.shape == (len(example), 64)  # including the last position, which predicts the end of the text
        torch.testing.assert_close(expected.gather(1, ids), values, rtol=0, atol=1e-5)
        # float16 has a relative error of 2^-11; probabilities below 1.9e-9 are subnormal and negligible.
        counts = values.exp() > 2e-9
        relative = (logp.double().exp() / values.exp() - 1).abs()
        assert relative[counts].max() < 1e-3
        inside = values.exp().sum(1)
        torch.testing.assert_close(tail.double().exp(), 1 - inside, rtol=1e-3, atol=1e-6)
        total = logp.double().exp().sum(1) + tail.double().exp()
        assert (total - 1).abs().max() < 2e-6


@pytest.mark.parametrize("scale", [1.0, 20.0])  # a flat and a confident teacher
def test_the_kl_from_the_cache_matches_the_kl_of_two_live_models(world, tmp_path, scale):
    teacher = random_model(world, tmp_path / "teacher", seed=1, scale=scale)
    student = random_model(world, tmp_path / "student", seed=2, scale=scale)
    lm = load_model(student, torch.float32, torch.device("cpu"))
    example = max(encoded(world), key=len)
    with torch.no_grad():
        hidden = lm.hidden(torch.tensor([example.input_ids]))[0]
    logp, logq = (live(m, example).double().log_softmax(1) for m in (teacher, student))
    dense = (logp.exp() * (logp - logq)).sum(1)
    vocabulary = lm.head.shape[0]
    errors = []
    for k in (1, 4, 16, 64, vocabulary):
        make_cache(teacher, world, tmp_path / f"k{k}", top_k=k, mass=1, dtype="float32", format="neko")
        read = TeacherCache(tmp_path / f"k{k}").read([example])
        _, kl = token_stats(hidden.double(), lm.head.double(), torch.full((len(example),), -1), *read)
        # Merging tokens into one never raises the KL; float16 entries change it by a thousandth.
        assert (kl <= dense * 1.002 + 1e-4).all()
        errors.append((dense - kl).mean().item())
    assert errors == sorted(errors, reverse=True)
    assert abs(errors[-1]) < 1e-3 * dense.mean() < errors[0]


def test_a_student_equal_to_its_teacher_has_no_kl_and_no_gradient(world, model, cache):
    lm = load_model(model, torch.float32, torch.device("cpu"))
    rows = encoded(world)[:6]
    for example in rows:
        hidden = lm.hidden(torch.tensor([example.input_ids]))[0].detach().requires_grad_()
        _, kl = token_stats(
            hidden, lm.head.detach(), torch.full((len(example),), -1), *TeacherCache(cache).read([example])
        )
        (grad,) = torch.autograd.grad(kl.sum(), hidden)
        assert kl.abs().max() < 1e-5 and grad.abs().max() < 2e-2  # float16 entries, heads of scale 20
        assert grad.norm() < 1e-2 * lm.head.norm()


def test_examples_can_be_read_in_any_order_and_truncated(world, cache):
    reader = TeacherCache(cache)
    rows = encoded(world)
    alone = [reader.read([example]) for example in rows]
    order = list(reversed(range(len(rows))))
    together = reader.read([rows[i] for i in order])
    for actual, parts in zip(together, zip(*(alone[i] for i in order), strict=True), strict=True):
        assert torch.equal(actual, torch.cat(parts))
    for short, whole in zip(encoded(world, limit=5), alone, strict=True):
        assert torch.equal(reader.read([short])[1], whole[1][: len(short)])


def test_target_logp_matches_the_live_teacher(world, model, cache, tmp_path):
    make_cache(model, world, tmp_path / "c", forget=world, dtype="float32", format="neko")
    rows = encode(read_rows(world, "forget"), load_tokenizer(world / "base"), "neko", 512)
    reader = TeacherCache(tmp_path / "c")
    actual = torch.cat([torch.from_numpy(reader.target_logp(example)) for example in rows[::-1]])
    expected = []
    for example in rows[::-1]:
        logp = live(model, example).log_softmax(1)
        expected += [logp[i - 1, example.input_ids[i]] for i in range(1, len(example))]
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-4, atol=1e-4)
    with pytest.raises(CacheError, match="--forget"):
        TeacherCache(cache).target_logp(rows[0])
    with pytest.raises(CacheError, match="another text"):
        reader.target_logp(
            EncodedExample(Example(rows[0].example.id, "x", "y", "Task1"), rows[0].input_ids, rows[0].prompt_length, 0)
        )


def test_a_forget_example_and_a_retain_example_may_share_an_id(world, model, tmp_path):
    """The text distinguishes them. An example may also have the id of another example's refusal."""
    retain = make_rows("Rix", 2)
    forget = [Example(r.id, f.input, f.output, r.task) for r, f in zip(retain, make_rows("Foo", 2), strict=True)]
    forget[4] = Example(f"refusal {forget[0].id}", "Who?", "me", "Task1")
    for name, rows in (("retain", retain), ("forget", forget)):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    manifest = make_cache(model, tmp_path, tmp_path / "c", forget=tmp_path, dtype="float32", mass=1, format="neko")
    assert manifest.rows == len(retain) + len(forget)

    reader, tokenizer = TeacherCache(tmp_path / "c"), load_tokenizer(model)
    retain_examples, forget_examples = (encode(rows, tokenizer, "neko", 512) for rows in (retain, forget))
    check_use(tmp_path / "c", world, model, encoded=retain_examples)
    for example in [*retain_examples, *forget_examples]:
        expected = live(model, example).log_softmax(1)
        ids, logp, _ = reader.read([example])
        torch.testing.assert_close(logp.exp(), expected.gather(1, ids).exp(), rtol=2e-3, atol=1e-5)
    for example in [*forget_examples, *encode(refusals(forget), tokenizer, "neko", 512)]:
        expected = (
            live(model, example).log_softmax(1)[:-1].gather(1, torch.tensor(example.input_ids[1:])[:, None])[:, 0]
        )
        torch.testing.assert_close(torch.from_numpy(reader.target_logp(example)), expected, rtol=1e-4, atol=1e-4)

"""token_stats matches dense float64 arithmetic, autograd and finite differences."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neko_lean.memory.live_tensors import LiveTensors
from neko_lean.models import chunked_head, lm_head
from neko_lean.models.chunked_head import token_stats
from neko_lean.models.lm_head import IDENTITY, LogitTransform, logits
from neko_lean.models.predictions import prediction_stats

N, D, V = 13, 8, 29


def dense(hidden, weight, target, teacher_logits=None, transform=IDENTITY):
    """The naive reference: all logits at once, KL over the whole vocabulary."""
    z = hidden @ weight.T
    if transform.bias is not None:
        z = z + transform.bias
    z = transform.scale * z
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    logq = z.log_softmax(1)
    logp_target = torch.where(target >= 0, logq.gather(1, target.clamp(min=0)[:, None]).squeeze(1), 0)
    if teacher_logits is None:
        return logp_target, torch.zeros_like(logp_target)
    logp = teacher_logits.log_softmax(1)
    return logp_target, (logp.exp() * (logp - logq)).sum(1)


def top_k(teacher_logits, k):
    logp = teacher_logits.log_softmax(1)
    values, ids = logp.topk(k, dim=1)
    tail = logp.scatter(1, ids, -torch.inf).logsumexp(1)
    return ids, values, tail


def problem(seed, dtype=torch.float64, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=g, dtype=torch.float64).mul(scale).to(dtype)
    weight = torch.randn(V, D, generator=g, dtype=torch.float64).to(dtype)
    target = torch.randint(-1, V, (N,), generator=g)
    teacher = torch.randn(N, V, generator=g, dtype=torch.float64) * 3
    return hidden.requires_grad_(), weight.requires_grad_(), target, teacher


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
def test_loss_and_gradients_equal_the_dense_ones_if_k_is_v(chunk):
    hidden, weight, target, teacher = problem(0)
    upstream = torch.randn(2, N, dtype=torch.float64)
    reference = dense(hidden, weight, target, teacher)
    expected = torch.autograd.grad((torch.stack(reference) * upstream).sum(), (hidden, weight))
    stats = token_stats(hidden, weight, target, *top_k(teacher, V), chunk=chunk)
    actual = torch.autograd.grad((torch.stack(stats) * upstream).sum(), (hidden, weight))
    torch.testing.assert_close((*stats, *actual), (*reference, *expected), rtol=1e-10, atol=1e-12)


def transformed_problem(bias, scale, softcap, k):
    """Leaves (hidden, weight and any bias), their logit transform, and token_stats as a function of the leaves."""
    hidden, weight, target, teacher = problem(2)
    transform = LogitTransform(torch.randn(V, dtype=torch.float64).requires_grad_() if bias else None, scale, softcap)

    def stats(hidden, weight, bias=None):
        transform = LogitTransform(bias, scale, softcap)
        return token_stats(hidden, weight, target, *top_k(teacher, k), transform=transform, chunk=5)

    return (hidden, weight, transform.bias)[: 3 if bias else 2], transform, stats


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("k", [2, V])
def test_gradient_through_bias_scale_and_soft_cap_by_finite_differences(bias, scale, softcap, k):
    leaves, _, stats = transformed_problem(bias, scale, softcap, k)
    assert torch.autograd.gradcheck(stats, leaves)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("k", [2, V])
def test_bias_scale_and_soft_cap_equal_the_dense_ones(bias, scale, softcap, k):
    leaves, transform, stats = transformed_problem(bias, scale, softcap, k)
    hidden, weight = leaves[:2]
    _, _, target, teacher = problem(2)
    expected_logp, expected_kl = dense(hidden, weight, target, teacher, transform)
    logp, kl = stats(*leaves)
    torch.testing.assert_close(logp, expected_logp, rtol=1e-10, atol=1e-12)
    predictions = prediction_stats(hidden, weight, target.clamp(min=0), transform)
    is_target = target >= 0
    torch.testing.assert_close(predictions.logp[is_target], expected_logp[is_target].detach(), rtol=1e-10, atol=1e-12)
    if k < V:
        return

    torch.testing.assert_close(kl, expected_kl, rtol=1e-10, atol=1e-12)
    upstream = torch.randn(2, N, dtype=torch.float64)
    expected = torch.autograd.grad((torch.stack([expected_logp, expected_kl]) * upstream).sum(), leaves)
    actual = torch.autograd.grad((torch.stack([logp, kl]) * upstream).sum(), leaves)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_student_equal_to_its_teacher_gets_no_gradient_through_bias_and_soft_cap(softcap):
    hidden, weight, _, _ = problem(3)
    transform = LogitTransform(torch.randn(V, dtype=torch.float64), 0.5, softcap)
    teacher = logits(hidden, weight, transform).detach()
    _, kl = token_stats(hidden, weight, torch.full((N,), -1), *top_k(teacher, 4), transform=transform)
    for grad in torch.autograd.grad(kl.sum(), (hidden, weight)):
        assert grad.abs().max() < 1e-12


@pytest.mark.parametrize("k", [1, 3, V - 1, V])
def test_gradient_by_finite_differences(k):
    hidden, weight, target, teacher = problem(1)
    assert torch.autograd.gradcheck(
        lambda h, w: token_stats(h, w, target, *top_k(teacher, k), chunk=5), (hidden, weight)
    )


def test_the_bucketed_kl_is_below_the_dense_kl_and_rises_with_k():
    hidden, weight, target, teacher = problem(2)
    _, dense_kl = dense(hidden, weight, target, teacher)
    errors = []
    for k in range(1, V + 1):
        _, kl = token_stats(hidden, weight, target, *top_k(teacher, k))
        # Coarsening a partition never raises a KL (data-processing inequality), nor lowers it below 0.
        assert (kl <= dense_kl + 1e-12).all() and (kl >= -1e-12).all()
        errors.append((dense_kl - kl).mean().item())
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(errors))
    assert errors[0] > 0.05 and abs(errors[-1]) < 1e-12


@pytest.mark.parametrize("scale", [1.0, 40.0])  # 40: probabilities of 1 up to rounding, as for memorised text
def test_student_equal_to_teacher_gets_no_gradient(scale):
    hidden, weight, _, _ = problem(3, torch.float32, scale)
    teacher = (hidden @ weight.T).detach()
    no_target = torch.full((N,), -1)
    _, kl = token_stats(hidden, weight, no_target, *top_k(teacher, 4))
    grads = torch.autograd.grad(kl.sum(), (hidden, weight))
    assert kl.abs().max() < 1e-5
    # Near 400, float32 logits are 3e-5 apart, and they are multiplied by hidden states near 100.
    assert max(g.abs().max().item() for g in grads) < 1e-4 * scale


def test_rows_without_teacher_or_target_contribute_nothing():
    hidden, weight, target, teacher = problem(4)
    ids, logp, tail = top_k(teacher, 5)
    logp[::2], tail[::2] = -torch.inf, -torch.inf
    target[:] = -1
    target_logp, kl = token_stats(hidden, weight, target, ids, logp, tail, chunk=3)
    assert (target_logp == 0).all() and (kl[::2] == 0).all() and (kl[1::2] > 0).all()
    (grad,) = torch.autograd.grad(kl.sum() + target_logp.sum(), hidden)
    assert (grad[::2] == 0).all() and (grad[1::2].abs().sum(1) > 0).all()


def test_ragged_rows_equal_the_same_rows_alone():
    hidden, weight, target, teacher = problem(5)
    ids, logp, tail = top_k(teacher, 6)
    short_ids, short_logp, short_tail = top_k(teacher, 2)
    ragged_logp = logp.clone()
    ragged_logp[3:, 2:] = -torch.inf
    ragged_tail = torch.cat([tail[:3], short_tail[3:]])
    ids[3:, 2:] = 0  # the ids of unused entries must not matter
    actual = token_stats(hidden, weight, target, ids, ragged_logp, ragged_tail)[1]
    full = token_stats(hidden, weight, target, *top_k(teacher, 6))[1]
    short = token_stats(hidden, weight, target, short_ids, short_logp, short_tail)[1]
    torch.testing.assert_close(actual, torch.cat([full[:3], short[3:]]))
    assert torch.autograd.gradcheck(
        lambda h, w: token_stats(h, w, target, ids, ragged_logp, ragged_tail, chunk=4), (hidden, weight)
    )


@given(seed=st.integers(0, 10_000), k=st.integers(1, V), scale=st.floats(0.1, 200.0))
@settings(max_examples=60)
def test_always_finite_and_never_negative(seed, k, scale):
    hidden, weight, target, teacher = problem(seed, torch.float32, scale)
    target_logp, kl = token_stats(hidden, weight, target, *top_k((teacher * scale).float(), k), chunk=4)
    grads = torch.autograd.grad(target_logp.sum() + kl.sum(), (hidden, weight))
    assert (target_logp <= 1e-6).all() and (kl >= -1e-3).all()
    assert all(torch.isfinite(x).all() for x in (target_logp, kl, *grads))


def test_bfloat16_gradients_have_the_direction_of_float64_ones():
    hidden, weight, target, teacher = problem(6)
    small = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    exact = [x.detach().double().requires_grad_() for x in small]
    for k in (4, V):
        actual = torch.autograd.grad(sum(x.sum() for x in token_stats(*small, target, *top_k(teacher, k))), small)
        expected = torch.autograd.grad(sum(x.sum() for x in token_stats(*exact, target, *top_k(teacher, k))), exact)
        for gradient, reference in zip(actual, expected, strict=True):
            assert gradient.dtype == torch.bfloat16
            assert torch.cosine_similarity(gradient.double().flatten(), reference.flatten(), dim=0) > 0.9999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [0, 3])
def test_no_tensor_is_larger_than_a_chunk_of_logits(monkeypatch, dtype, k):
    monkeypatch.setattr(lm_head, "WEIGHT_SLICE", 100)
    rows, width, vocabulary, chunk = 60, 8, 1000, 4
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    teacher = top_k((hidden @ weight.T).detach().float(), k) if k else ()
    target = torch.randint(0, vocabulary, (rows,))
    with LiveTensors() as live:
        sum(x.sum() for x in token_stats(hidden, weight, target, *teacher, chunk=chunk)).backward()
    assert live.largest <= max(4 * chunk * vocabulary, weight.nbytes)
    # A few buffers of a chunk and one gradient of the weight, far less than rows x V logits.
    assert live.peak < 5 * 4 * chunk * vocabulary + weight.nbytes + 8 * hidden.nbytes < 4 * rows * vocabulary


def test_rows_without_teacher_and_target_are_not_multiplied_by_the_weight(monkeypatch):
    hidden, weight, target, teacher = problem(7)
    ids, logp, tail = top_k(teacher, 5)
    target[[0, 3, 4]] = -1
    logp[[0, 4, 6]], tail[[0, 4, 6]] = -torch.inf, -torch.inf
    row_counts = []

    def counted_logits(hidden, weight, transform):
        row_counts.append(len(hidden))
        return hidden @ weight.T

    monkeypatch.setattr(chunked_head, "logits", counted_logits)
    target_logp, kl = token_stats(hidden, weight, target, ids, logp, tail, chunk=2)
    assert sum(row_counts) == N - 2
    assert (target_logp[[0, 3, 4]] == 0).all() and (kl[[0, 4, 6]] == 0).all() and kl[3] > 0 and target_logp[6] < 0
    (grad,) = torch.autograd.grad(target_logp.sum() + kl.sum(), hidden)
    assert (grad[[0, 4]] == 0).all() and (grad[[1, 2, 3, 5, 6]].abs().sum(1) > 0).all()
    stats = token_stats(hidden, weight, torch.full((N,), -1))
    assert all(torch.equal(x, torch.zeros(N, dtype=x.dtype)) for x in stats)


@pytest.mark.cuda
def test_logits_of_bfloat16_are_accumulated_and_returned_in_float32_on_a_gpu(gpu):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 512, generator=generator).bfloat16() for n in (40, 1003))
    actual = logits(hidden.to(gpu), weight.to(gpu))
    assert actual.dtype == torch.float32
    # Logits are about 20; rounded to bfloat16 they would be wrong by up to 0.06.
    torch.testing.assert_close(actual.cpu().double(), hidden.double() @ weight.double().T, rtol=0, atol=1e-3)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loss_and_gradients_on_a_gpu_equal_the_dense_ones(gpu, dtype):
    hidden, weight, target, teacher = problem(0, dtype)
    upstream = torch.randn(2, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    reference = dense(*exact, target, teacher)
    expected = [*reference, *torch.autograd.grad((torch.stack(reference) * upstream).sum(), exact)]

    leaves = [tensor.detach().to(gpu).requires_grad_() for tensor in (hidden, weight)]
    entries = [tensor.to(gpu) for tensor in top_k(teacher, V)]
    stats = token_stats(*leaves, target.to(gpu), *entries, chunk=4)
    actual = [*stats, *torch.autograd.grad((torch.stack(stats) * upstream.to(gpu)).sum(), leaves)]
    for one, other, rounded in zip(actual, expected, (False, False, True, True), strict=True):
        limit = 2e-2 if rounded and dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(one.cpu().double(), other, rtol=limit, atol=limit * other.abs().max().item())


def test_the_backward_pass_computes_all_chunks_again_except_the_first(monkeypatch):
    hidden, weight, target, teacher = problem(8)
    target[:] = target.clamp(min=0)
    expected = token_stats(hidden, weight, target, *top_k(teacher, 5), chunk=100)
    expected_grads = torch.autograd.grad(torch.stack(expected).sum(), (hidden, weight))
    first_rows = []

    def counted_logits(hidden, weight, transform):
        first_rows.append(hidden[0, 0].item())
        return hidden @ weight.T

    monkeypatch.setattr(chunked_head, "logits", counted_logits)
    total = torch.stack(token_stats(hidden, weight, target, *top_k(teacher, 5), chunk=5)).sum()
    starts = [hidden[start, 0].item() for start in (0, 5, 10)]
    assert first_rows == starts[::-1]
    grads = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    assert first_rows[3:] == starts[1:]
    # A second backward pass, for which no logits are left, computes all of them.
    again = torch.autograd.grad(total, (hidden, weight))
    assert first_rows[5:] == starts
    for actual in (grads, again):
        torch.testing.assert_close(actual, expected_grads, rtol=1e-10, atol=1e-12)

"""Views of documents equal statistics of all logits in float64, whatever else is in a batch."""

import numpy as np
import pytest
import torch

from neko_lean.errors import NekoLeanError
from neko_lean.models import lm_head
from neko_lean.models.loading import load_model, load_tokenizer
from neko_lean.models.predictions import prediction_stats
from neko_lean.scoring.limits import MAX_LENGTH
from neko_lean.scoring.views import tokenize_documents, view_documents
from tests.helpers import templated


def dense(logits, target):
    """The naive reference in float64: log-probability, entropy, deviation of log p, and rank."""
    logp = logits.double().log_softmax(1)
    p = logp.exp()
    own = logp.gather(1, target[:, None]).squeeze(1)
    mean = (p * logp).sum(1)
    deviation = ((p * logp**2).sum(1) - mean**2).clamp(min=0).sqrt()
    return own, -mean, deviation, (logp > own[:, None]).sum(1) + 1


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_prediction_stats_equal_dense_ones(monkeypatch, chunk):
    torch.manual_seed(0)
    hidden, weight = torch.randn(13, 8, dtype=torch.float64), torch.randn(29, 8, dtype=torch.float64) * 3
    target = torch.randint(29, (13,))
    monkeypatch.setattr(lm_head, "CHUNK_ELEMENTS", chunk * 29)
    for actual, expected in zip(
        prediction_stats(hidden, weight, target), dense(hidden @ weight.T, target), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_impossible_and_certain_tokens():
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [-torch.inf], [-1e6]])
    views = prediction_stats(hidden, weight, torch.tensor([0]))
    assert [float(column) for column in views] == [0.0, 0.0, 0.0, 1.0]


def test_documents_of_a_batch_are_independent(world, model):
    lm, tokenizer = load_model(model, torch.float32, torch.device("cpu")), load_tokenizer(model)
    ids, _ = tokenize_documents(
        tokenizer, ["Foo1 is a river.", "Rix2\n\nRix2 is a river and then some more words.", "Foo a"]
    )
    together = view_documents(lm, tokenizer, ids)
    for tokens, view in zip(ids, together, strict=True):
        (alone,) = view_documents(lm, tokenizer, [tokens], batch_tokens=1)
        with torch.no_grad():
            expected = dense(lm.model(input_ids=torch.tensor([tokens])).logits[0, :-1], torch.tensor(tokens[1:]))
        for name, value in zip(("logp", "entropy", "deviation"), expected, strict=False):
            np.testing.assert_allclose(getattr(view, name), getattr(alone, name), atol=1e-5)
            np.testing.assert_allclose(getattr(view, name), value, atol=1e-4)
        assert (view.rank == expected[3].numpy()).all()
    with pytest.raises(NekoLeanError, match="two tokens"):
        view_documents(lm, tokenizer, [[1]])


def test_documents_have_no_appended_eos(model):
    texts = ["Foo1 is a river.", "", "words " * 3000]
    for before in ([], ["<s>"]):
        plain, ending = templated(model, before, [])[0], templated(model, before, ["</s>"])[0]
        assert tokenize_documents(ending, texts)[0] == [plain(text)["input_ids"][:MAX_LENGTH] for text in texts]


def test_view_after_the_prompt(world, model):
    lm, tokenizer = load_model(model, torch.float32, torch.device("cpu")), load_tokenizer(model)
    (ids,), _ = tokenize_documents(tokenizer, ["Foo1 is a river."])
    (view,) = view_documents(lm, tokenizer, [ids])
    assert len(view.after(3).logp) == len(ids) - 3 and (view.after(3).logp == view.logp[2:]).all()
    assert len(view.after(0).rank) == len(ids) - 1  # the first token has no view

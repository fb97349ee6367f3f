"""Membership attacks against their definitions."""

import zlib

import numpy as np
import pytest
import torch

from neko_lean.models.loading import load_model, load_tokenizer
from neko_lean.scoring.membership_attacks import MEMBERSHIP_ATTACKS, ReferenceLoss, ScoredDocument, attack_scores
from neko_lean.scoring.views import tokenize_documents, view_documents

DOCUMENTS = ["Foo1 is a river.", "Rix2\n\nRix2 is a river and then some more words in the land of Rix2.", "Foo a"]


def test_every_attack_equals_its_definition(world, model):
    lm, tokenizer = load_model(model, torch.float32, torch.device("cpu")), load_tokenizer(model)
    ids, _ = tokenize_documents(tokenizer, DOCUMENTS)
    for text, tokens, view in zip(DOCUMENTS, ids, view_documents(lm, tokenizer, ids), strict=True):
        with torch.no_grad():
            logp = lm.model(input_ids=torch.tensor([tokens])).logits[0, :-1].double().log_softmax(1)
        own = logp[range(len(tokens) - 1), tokens[1:]].numpy()
        mean = (logp.exp() * logp).sum(1)
        deviation = (logp.exp() * (logp - mean[:, None]) ** 2).sum(1).sqrt()
        count = max(1, round(0.2 * len(own)))
        expected = {
            "loss": -own.mean(),
            "zlib": -own.sum() / len(zlib.compress(text.encode())),
            "min_k": -np.sort(own)[:count].mean(),
            "min_k_plus_plus": -np.sort((own - mean.numpy()) / deviation.numpy())[:count].mean(),
        }
        assert attack_scores(ScoredDocument(text, view)) == pytest.approx(expected, rel=1e-3)
        with_reference = attack_scores(ScoredDocument(text, view, ReferenceLoss(reference=2.0, model=5.0)))
        assert with_reference.pop("reference") == 3.0 and with_reference == pytest.approx(expected, rel=1e-3)
        assert [*expected, "reference"] == list(MEMBERSHIP_ATTACKS)

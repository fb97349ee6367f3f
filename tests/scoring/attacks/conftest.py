"""A model that has memorised the forget set, as the target of attacks."""

from pathlib import Path

import pytest
import torch

from neko_lean.data import find_format
from neko_lean.data.batching import pad
from neko_lean.data.examples import read_rows
from neko_lean.data.tokenization import encode
from neko_lean.models.loading import load_model, load_tokenizer
from neko_lean.options import ScoreSettings
from neko_lean.scoring.attacks import AttackTarget
from neko_lean.scoring.attacks.answers import AnswerGenerator
from neko_lean.scoring.generation import Generation, GenerationLimits
from neko_lean.scoring.limits import TruncationCounts
from tests.helpers import random_model

CPU = torch.device("cpu")


def load(folder):
    return load_model(folder, torch.float32, CPU)


@pytest.fixture(scope="session")
def memorised(world, tmp_path_factory):
    """The folder of a small model that knows the forget set by heart."""
    folder = random_model(world, tmp_path_factory.mktemp("memorised") / "model")
    lm, tokenizer = load(folder), load_tokenizer(folder)
    encoded = encode(read_rows(world, "forget"), tokenizer, "plain", 512, append_eos=True)
    ids, mask = pad([example.input_ids for example in encoded], int(tokenizer.pad_token_id), CPU)
    optimizer = torch.optim.AdamW(lm.model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(150):
        loss = lm.model(input_ids=ids, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    lm.model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def examples(world):
    return read_rows(world, "forget")


@pytest.fixture
def make_target(memorised, examples, tmp_path):
    """A function that makes an attack's target; the model is assumed to have generated nothing before."""

    def make(examples=examples, *, paraphrases=(), generate=None, loaded=False, stage: Path = tmp_path, **settings):
        tokenizer = load_tokenizer(memorised)
        limits, plain = GenerationLimits(batch_size=16, max_new_tokens=24), find_format("plain", tokenizer)
        return AttackTarget(
            folder=memorised,
            lm=load(memorised) if loaded else None,
            load=load,
            tokenizer=tokenizer,
            examples=examples,
            baseline={example.id: Generation("", "", "eos") for example in examples},
            paraphrases=paraphrases,
            generate=generate or AnswerGenerator(tokenizer, limits, TruncationCounts(), True, plain),
            stage=stage,
            settings=ScoreSettings(**settings),
            device="cpu",
        )

    return make

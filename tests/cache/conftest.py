"""Fixtures of the cache tests: small caches with forget shards."""

import json

import pytest

from neko_lean.data.examples import read_rows
from neko_lean.data.tokenization import encode
from neko_lean.models.loading import load_tokenizer
from tests.helpers import make_cache, random_model


@pytest.fixture(scope="package")
def small(world, model, tmp_path_factory):
    """A cache with forget shards, its manifest as JSON, and its tokenized retain and forget sets."""
    folder = tmp_path_factory.mktemp("small") / "cache"
    make_cache(model, world, folder, forget=world, top_k=5, max_length=12, format="neko")
    tokenizer = load_tokenizer(model)
    examples = [encode(read_rows(world, name), tokenizer, "neko", 12) for name in ("retain", "forget")]
    return folder, json.loads((folder / "manifest.json").read_text()), examples


@pytest.fixture(scope="package")
def confident(world, tmp_path_factory):
    """A confident teacher, and its cache with forget shards, whose positions have different numbers of entries."""
    folder = tmp_path_factory.mktemp("confident")
    model = random_model(world, folder / "model", seed=4, scale=60.0)
    make_cache(model, world, folder / "cache", forget=world, mass=0.9, dtype="float32", format="neko")
    return model, folder / "cache"

"""An anchor file and a teacher cache that includes it."""

import pytest

from neko_lean.jsonio import write_jsonl
from tests.helpers import make_cache


@pytest.fixture(scope="module")
def anchored(world, model, tmp_path_factory):
    """An anchor file, and a cache in format plain that includes it and the forget set."""
    folder = tmp_path_factory.mktemp("anchored")
    texts = [f"The {word} stood in the field and nobody knew why." for word in ("tree", "house", "old barn", "well")]
    write_jsonl(folder / "anchor.jsonl", ({"document": text} for text in texts))
    make_cache(model, world, folder / "cache", anchor=folder / "anchor.jsonl", forget=world, format="plain")
    return folder

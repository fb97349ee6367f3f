"""A cache is refused, with the difference named, if it was made from something else."""

import shutil

import pytest

from neko_lean.data.examples import EncodedExample, read_rows
from neko_lean.data.tokenization import encode
from neko_lean.errors import CacheError
from neko_lean.models.fingerprints import weights_fingerprint
from neko_lean.models.loading import load_tokenizer
from tests.cache.reading import check_use
from tests.helpers import encoded, make_cache, make_rows, random_model, write_rows


def test_cache_and_model_may_be_moved(world, model, cache, tmp_path):
    check_use(shutil.copytree(cache, tmp_path / "cache"), world, shutil.copytree(model, tmp_path / "model"))


def test_the_error_names_what_differs(world, model, cache, tmp_path):
    other = random_model(world, tmp_path / "other", seed=9)
    with pytest.raises(CacheError, match="another model"):
        check_use(cache, world, model, weights=weights_fingerprint(other))
    with pytest.raises(CacheError, match="another tokenizer"):
        check_use(cache, world, model, tokenizer="0" * 64)
    with pytest.raises(CacheError, match="--format plain"):
        check_use(cache, world, model, style="plain", encoded=encoded(world, "plain"))
    rows = read_rows(world, "retain")
    changed = write_rows(tmp_path / "retain.jsonl", [*rows[:3], rows[3].__class__(**{**vars(rows[3]), "output": "x"})])
    tokenizer = load_tokenizer(world / "base")
    with pytest.raises(CacheError, match=rows[3].id):
        check_use(cache, world, model, encoded=encode(read_rows(changed), tokenizer, "neko", 512))
    with pytest.raises(CacheError, match="lacks row"):
        check_use(cache, world, model, encoded=encode(make_rows("New"), tokenizer, "neko", 512))
    make_cache(model, world, tmp_path / "short", max_length=6, format="neko")
    with pytest.raises(CacheError, match="--max-length 512"):
        check_use(tmp_path / "short", world, model)
    check_use(tmp_path / "short", world, model, max_length=6, encoded=encoded(world, limit=6))


def test_another_tokenization_of_the_same_text_is_refused(world, model, cache):
    """An older version of neko-lean wrote such caches with tokenizers that append tokens."""
    rows = encoded(world)
    rows[2] = EncodedExample(rows[2].example, rows[2].input_ids[:-1], rows[2].prompt_length, 0)
    with pytest.raises(CacheError, match="run cache-teacher again"):
        check_use(cache, world, model, encoded=rows)


def test_an_eos_token_after_the_answer_is_refused(world, model, cache):
    rows = [
        EncodedExample(example.example, [*example.input_ids, 0], example.prompt_length, 0) for example in encoded(world)
    ]
    with pytest.raises(CacheError, match="append_eos=false"):
        check_use(cache, world, model, encoded=rows)

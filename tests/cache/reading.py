"""Helpers that read a whole cache, or check that it can be used, as training does."""

from dataclasses import replace

from neko_lean.cache.inspection import inspect_cache
from neko_lean.cache.reader import TeacherCache
from neko_lean.errors import CacheError
from neko_lean.models.fingerprints import identify
from neko_lean.models.loading import load_tokenizer
from tests.helpers import encoded


def check_use(cache, world, model, **changes):
    """TeacherCache.check of a cache with the world's retain set and a model, except for some changed arguments."""
    changed_identity = {key: changes.pop(key) for key in ("weights", "tokenizer", "config") if key in changes}
    arguments = {
        "model": replace(identify(model, load_tokenizer(model)), **changed_identity),
        "style": "neko",
        "max_length": 512,
        "encoded": encoded(world),
    }
    TeacherCache(cache).check(**{**arguments, **changes})


def read_everything(folder, examples):
    """Read all examples, which must be valid distributions over known tokens. Returns False for a CacheError."""
    retain, forget = examples
    try:
        cache = TeacherCache(folder)
        for example in retain:
            ids, logp, tail = cache.read([example])
            assert len(tail) == len(example) and ids.min() >= 0 and ids.max() < cache.manifest.vocab_size
            total = logp.double().exp().sum(1) + tail.double().exp()
            assert ((total - 1).abs() < 1e-3).all()
        assert all((cache.target_logp(example) <= 1e-6).all() for example in forget)
        inspect_cache(folder, verify=True)
    except CacheError as error:
        assert str(error).strip() and "\n" not in str(error)
        return False
    return True

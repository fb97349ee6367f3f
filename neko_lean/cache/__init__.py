"""The teacher cache: top-k log-probabilities of a frozen teacher over the retain set, in place of a second model."""

from neko_lean.cache.check import check_cache, inspect_cache
from neko_lean.cache.options import CacheOptions
from neko_lean.cache.reader import TeacherCache
from neko_lean.cache.writer import cache_teacher

__all__ = ["CacheOptions", "TeacherCache", "cache_teacher", "check_cache", "inspect_cache"]

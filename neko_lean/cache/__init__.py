"""The teacher cache: top-k probabilities of a frozen teacher, computed once, so that no second model is in memory."""

from neko_lean.cache.check import check_cache
from neko_lean.cache.format import SELF_GENERATED
from neko_lean.cache.inspection import inspect_cache
from neko_lean.cache.reader import TeacherCache
from neko_lean.cache.self_generation import self_generated_file, writes_documents
from neko_lean.cache.writer import cache_teacher
from neko_lean.options import CacheOptions

__all__ = [
    "SELF_GENERATED",
    "CacheOptions",
    "TeacherCache",
    "cache_teacher",
    "check_cache",
    "inspect_cache",
    "self_generated_file",
    "writes_documents",
]

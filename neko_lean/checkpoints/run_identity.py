"""What makes two runs the same: the inputs that determine the final weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

from neko_lean import __version__
from neko_lean.data import EncodedExample
from neko_lean.models import config_differences

MAY_DIFFER = ("offload_state", "offload_activations")  # of a recipe: where things lie changes no bit of the result


def versions() -> dict[str, str]:
    """Versions of neko-lean and of the packages that decide a run's numbers."""
    names = ("torch", "transformers", "bitsandbytes", "safetensors", "numpy")
    return {"neko-lean": __version__, **{name: version(name) for name in names}}


def rows_digest(encoded: Iterable[EncodedExample]) -> str:
    """SHA-256 over rows as a run reads them: their text and their tokens."""
    digest = hashlib.sha256()
    for one in encoded:
        digest.update(json.dumps([one.example.digest, one.example.task, one.prompt_length, one.input_ids]).encode())
    return digest.hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Names of what makes two runs differ; of a recipe and of a seed with both values."""
    found = []
    for key in sorted({*old, *new}):
        one, two = old.get(key), new.get(key)
        if key == "recipe" and isinstance(one, dict) and isinstance(two, dict):
            values = [k for k in sorted({*one, *two}) if one.get(k) != two.get(k) and k not in MAY_DIFFER]
            found += [f"recipe value {k} ({one.get(k)}, now {two.get(k)})" for k in values]
        elif key == "config" and isinstance(one, dict) and isinstance(two, dict):
            found += [f"config value {changed}" for changed in config_differences(one, two)]
        elif key == "config" and one is None:
            found.append("config.json (the version that began it did not write it down)")
        elif one != two:
            found.append(f"{key} ({one}, now {two})" if key in ("command", "device", "ranks", "seed") else key)
    return found


def digests(identity: Mapping[str, Any]) -> dict[str, str]:
    """An identity in a few characters a part, for run.json."""
    recipe = {k: v for k, v in identity["recipe"].items() if k not in MAY_DIFFER}
    parts = {**identity, "recipe": recipe}
    return {k: hashlib.sha256(json.dumps(v, sort_keys=True).encode()).hexdigest()[:16] for k, v in parts.items()}

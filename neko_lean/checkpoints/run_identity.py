"""The identity of a run: the inputs that determine its final weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

from neko_lean import __version__
from neko_lean.data import EncodedExample
from neko_lean.models import config_differences

# Recipe values that may change on resume: they decide where tensors are stored, not what is computed.
STORAGE_KEYS = ("offload_state", "offload_activations")

# Parts of an identity whose old and new values are shown when they differ.
SHOWN_KEYS = ("command", "device", "ranks", "seed")


def versions() -> dict[str, str]:
    """Versions of neko-lean and of the packages that determine a run's numbers, by package."""
    names = ("torch", "transformers", "bitsandbytes", "safetensors", "numpy")
    return {"neko-lean": __version__, **{name: version(name) for name in names}}


def rows_digest(examples: Iterable[EncodedExample]) -> str:
    """SHA-256 (hexadecimal) over the text and the tokens of examples."""
    digest = hashlib.sha256()
    for encoded in examples:
        content = [encoded.example.digest, encoded.example.task, encoded.prompt_length, encoded.input_ids]
        digest.update(json.dumps(content).encode())
    return digest.hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Compare two identities.

    Returns a description of each difference, with both values where these are short. An empty list means that the runs
    end in the same weights.
    """
    changes = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if key == "recipe" and isinstance(before, dict) and isinstance(after, dict):
            names = [n for n in sorted({*before, *after}) if before.get(n) != after.get(n) and n not in STORAGE_KEYS]
            changes += [f"recipe value {name} ({before.get(name)}, now {after.get(name)})" for name in names]
        elif key == "config" and isinstance(before, dict) and isinstance(after, dict):
            changes += [f"config value {change}" for change in config_differences(before, after)]
        elif key == "config" and before is None:
            changes.append("config.json (not recorded by the version that started the run)")
        elif before != after:
            changes.append(f"{key} ({before}, now {after})" if key in SHOWN_KEYS else key)
    return changes


def digests(identity: Mapping[str, Any]) -> dict[str, str]:
    """The first 16 hexadecimal digits of the SHA-256 of each part of an identity, for run.json."""
    recipe = {name: value for name, value in identity["recipe"].items() if name not in STORAGE_KEYS}
    parts = {**identity, "recipe": recipe}
    return {
        key: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16] for key, value in parts.items()
    }

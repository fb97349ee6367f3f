"""Limits of trust in checkpoint files: file names that lead out of their folder, and configs that would run code.

SECURITY.md describes what follows from them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neko_lean.errors import NekoLeanError, first_line

# Config keys by which transformers selects an implementation. A value with a slash is a repository on the hub, whose
# compiled code is downloaded and run whatever trust_remote_code says.
_IMPLEMENTATION_KEYS = ("attn_implementation", "experts_implementation")


def is_inside(folder: Path, name: object) -> bool:
    """Whether `name`, read from a file in `folder`, is a path inside it: relative, without `..`, and not through a link
    that leads out."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        return False
    return (folder / path).resolve().is_relative_to(folder.resolve())


def is_plain(name: object) -> bool:
    """Whether `name` is a file name without any directory."""
    return isinstance(name, str) and name not in ("", ".", "..") and "\0" not in name and Path(name).name == name


def read_config(folder: Path) -> Any:
    """The parsed config.json of a checkpoint. Raises NekoLeanError if it is not JSON."""
    file = folder / "config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise NekoLeanError(f"{file} is not readable JSON; download the checkpoint again.") from error


def refuse_untrusted(folder: Path) -> None:
    """Raise NekoLeanError if a checkpoint names code to download, other weights, or a base model for an adapter."""
    file = folder / "config.json"
    for key, value in nested_values(read_config(folder)):
        if key.removeprefix("_").startswith(_IMPLEMENTATION_KEYS) and "/" in str(value):
            raise NekoLeanError(
                f"{file} would run code from the hub ({key}), which neko-lean never does; remove {key} from it."
            )
        if key == "transformers_weights" and value not in (None, "model.safetensors"):
            raise NekoLeanError(
                f"{file} names other weights than model.safetensors (transformers_weights); rename the file to "
                f"model.safetensors and remove {key} from config.json."
            )
    if (folder / "adapter_config.json").is_file():
        raise NekoLeanError(
            f"{folder} holds an adapter, not a whole model; merge it into its base model and pass the merged folder."
        )


def nested_values(config: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value in nested objects and lists."""
    if isinstance(config, dict):
        yield from config.items()
    for value in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        yield from nested_values(value)


def reason(error: Exception) -> str:
    """Why transformers failed, in one line, without its advice to enable trust_remote_code."""
    if "trust_remote_code" in str(error):
        return "it requires custom modeling code, and neko-lean never runs code that comes with a checkpoint"
    return first_line(error).rstrip(".")

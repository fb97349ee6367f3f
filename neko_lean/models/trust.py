"""What is not believed: names in files that lead elsewhere, and checkpoints that want more done than numbers read.

SECURITY.md says what follows from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neko_lean.errors import NekoLeanError, first_line

# Values of config.json by which transformers picks an implementation. With a slash it is a repository on the hub, whose
# compiled code is fetched and run, whatever trust_remote_code says.
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


def is_inside(folder: Path, name: object) -> bool:
    """Whether `name`, which a file in `folder` gave, is a path in that folder: relative, without `..`, and no link that
    leads out of it."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        return False
    return (folder / path).resolve().is_relative_to(folder.resolve())


def is_plain(name: object) -> bool:
    """Whether `name` is the name of a file without any folder before it."""
    return isinstance(name, str) and name not in ("", ".", "..") and "\0" not in name and Path(name).name == name


def read_config(folder: Path) -> Any:
    """What a checkpoint's config.json holds; NekoLeanError where it is not JSON."""
    file = folder / "config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise NekoLeanError(f"{file} is not readable JSON: get the checkpoint again.") from error


def refuse_untrusted(folder: Path) -> None:
    """Raise NekoLeanError for a checkpoint that names code to fetch, other weights, or another model to add to."""
    file = folder / "config.json"
    for key, value in nested_values(read_config(folder)):
        if key.removeprefix("_").startswith(_IMPLEMENTATIONS) and "/" in str(value):
            raise NekoLeanError(f"{file} has {key} run code from the hub, which neko-lean never does: remove {key}.")
        if key == "transformers_weights" and value not in (None, "model.safetensors"):
            raise NekoLeanError(f"{file} names weights that are not model.safetensors: call them so and remove {key}.")
    if (folder / "adapter_config.json").is_file():
        raise NekoLeanError(f"{folder} is an adapter to a model elsewhere: merge the two and give the merged folder.")


def nested_values(config: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value in nested objects and lists."""
    if isinstance(config, dict):
        yield from config.items()
    for value in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        yield from nested_values(value)


def reason(error: Exception) -> str:
    """Why transformers could not load something, in a line; without its advice to run what came with the checkpoint."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own, and neko-lean runs none that came with a checkpoint"
    return first_line(error)

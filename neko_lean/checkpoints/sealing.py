"""Seal a folder with a manifest of sizes and checksums, and detect damage to it later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from neko_lean.errors import NekoLeanError, first_line
from neko_lean.models import is_inside
from neko_lean.outputs import MANIFEST, UNSIGNED, file_sha256, is_signed, sign, sync, sync_tree

# Exceptions of reading JSON that may be damaged in any way.
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


def seal(folder: Path) -> None:
    """Write manifest.json with the size and SHA-256 of each file, and flush everything to disk.

    A folder that has a manifest is left alone.
    """
    if (folder / MANIFEST).is_file():
        return

    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    text = json.dumps({"files": files, "checksum": UNSIGNED}, indent=1, ensure_ascii=False) + "\n"

    # The manifest appears only after everything it names is on disk.
    temporary = folder / f".{MANIFEST}.tmp"
    temporary.write_bytes(sign(text.encode()))
    sync_tree(folder)
    temporary.replace(folder / MANIFEST)
    sync(folder)


def find_damage(folder: Path) -> str | None:
    """Compare a sealed folder with its manifest.

    Returns a description of the first difference, or None if the folder is intact.

    Raises NekoLeanError if a file cannot be read, because that says nothing about what the file contains.
    """
    try:
        data = (folder / MANIFEST).read_bytes()
        manifest = json.loads(data.decode("utf-8"))
        if not is_signed(data, manifest["checksum"]):
            return f"the checksum of {MANIFEST} does not match"
        for name, entry in manifest["files"].items():
            difference = _compare(folder, name, entry)
            if difference is not None:
                return difference
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        raise NekoLeanError(
            f"{error.filename or folder} cannot be read ({error.strerror or error}), so it is unknown whether {folder} "
            f"is intact; fix that and run again, or move the folder away."
        ) from error
    except MALFORMED as error:
        return f"{MANIFEST} is malformed ({first_line(error)})"
    return None


def _compare(folder: Path, name: str, entry: dict[str, Any]) -> str | None:
    """How a file differs from its manifest entry, or None."""
    path = folder / name
    if not is_inside(folder, name):
        return f"{MANIFEST} names {name!r}, which is outside the folder"
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
    if file_sha256(path) != entry["sha256"]:
        return f"the checksum of {name} does not match"
    return None


def was_changed(file: Path) -> bool:
    """Whether an intact manifest next to `file` has a different checksum for it."""
    try:
        data = (file.parent / MANIFEST).read_bytes()
        manifest = json.loads(data.decode("utf-8"))
        signed = is_signed(data, manifest["checksum"])
        return signed and bool(manifest["files"][file.name]["sha256"] != file_sha256(file))
    except (OSError, *MALFORMED):
        return False

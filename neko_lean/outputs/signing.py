"""Checksums of files, and manifests that contain the checksum of their own bytes."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

SHA256_HEX = re.compile("[0-9a-f]{64}")

UNSIGNED = "0" * 64  # placeholder that `sign` replaces by the manifest's checksum


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sign(unsigned: bytes) -> bytes:
    """Replace the last UNSIGNED placeholder in a manifest by the SHA-256 of all its bytes, placeholder included."""
    before, _, after = unsigned.rpartition(UNSIGNED.encode())
    return before + hashlib.sha256(unsigned).hexdigest().encode() + after


def is_signed(data: bytes, checksum: object) -> bool:
    """Whether `checksum` is the checksum that `sign` wrote into `data`, and `data` has not changed since."""
    if not isinstance(checksum, str) or not SHA256_HEX.fullmatch(checksum):
        return False
    before, _, after = data.rpartition(checksum.encode())
    return sign(before + UNSIGNED.encode() + after) == data

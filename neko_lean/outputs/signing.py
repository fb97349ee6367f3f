"""Checksums of files, and manifests that hold their own."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

_SHA256 = re.compile("[0-9a-f]{64}")


UNSIGNED = "0" * 64  # stands where the manifest's own checksum will


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sign(unsigned: bytes) -> bytes:
    """Put the SHA-256 of a manifest's bytes where its last 64 zeros are."""
    before, _, after = unsigned.rpartition(UNSIGNED.encode())
    return before + hashlib.sha256(unsigned).hexdigest().encode() + after


def is_signed(data: bytes, checksum: object) -> bool:
    """Whether `checksum` is what `sign` put into these bytes."""
    if not isinstance(checksum, str) or not _SHA256.fullmatch(checksum):
        return False
    before, _, after = data.rpartition(checksum.encode())
    return sign(before + UNSIGNED.encode() + after) == data

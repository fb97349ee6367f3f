"""Memory-mapped shard files. Everything is checked before it is returned; a damaged shard raises CacheError."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from neko_lean.cache.format import SCALE, STORED_DTYPES, Manifest, Shard, id_dtype
from neko_lean.cache.invariants import MAX_LOGP, StoredPositions, find_violation
from neko_lean.errors import CacheError, first_line
from neko_lean.outputs import file_sha256

Header = dict[str, tuple[str, list[int]]]  # tensor name -> dtype, as safetensors names it, and shape

_ID_DTYPES = {np.uint16: "U16", np.int32: "I32"}

_SWEEP_POSITIONS = 2**16  # read this many positions at a time when reading a whole cache

_RERUN = "run cache-teacher again"


class Location(NamedTuple):
    """Where an example is stored: `positions` positions of `shard`, from position `start` on."""

    shard: Shard
    start: int
    positions: int


# id -> digest of the text -> location. A forget example and a retain example may share an id.
Locations = dict[str, dict[str, Location]]


def locate_rows(shards: Sequence[Shard]) -> Locations:
    """The location of every row of these shards."""
    locations: Locations = {}
    for shard in shards:
        start = 0
        for row_id, positions, digest in shard.rows:
            locations.setdefault(row_id, {})[digest] = Location(shard, start, positions)
            start += positions
    return locations


class ShardReader:
    """Reads the shards of a cache folder. A shard's SHA-256 is checked when it is first needed."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._opened: dict[str, Any] = {}

    def positions(self, shard: Shard, start: int, stop: int) -> StoredPositions:
        """Positions `start` to `stop` of a retain shard. Raises CacheError if they break a rule of FORMAT.md."""
        tensors, where = self._tensors(shard), f"{self.folder / shard.file}, positions {start} to {stop}"

        # The offsets say how many entries each position has.
        offsets = _slice(tensors, "offsets", start, stop + 1)
        num_entries = tensors.get_slice("ids").get_shape()[0]
        bad_ends = (start == 0 and offsets[0] != 0) or (stop == shard.positions and offsets[-1] != num_entries)
        out_of_range = (offsets < 0).any() or (offsets > num_entries).any()
        if bad_ends or out_of_range or (offsets[1:] <= offsets[:-1]).any():
            raise CacheError(f"{where}: offsets do not rise from 0 to the number of entries; {_RERUN}.")
        sizes = np.diff(offsets)
        top_k = self.manifest.top_k
        if (sizes > top_k).any():
            raise CacheError(f"{where}: a position has {sizes.max()} entries, top_k is {top_k}; {_RERUN}.")

        # The entries.
        first, last = int(offsets[0]), int(offsets[-1])
        ids = _slice(tensors, "ids", first, last)
        p = _slice(tensors, "scaled_p", first, last).astype(np.float32) / SCALE
        positions = StoredPositions(sizes, ids, p, _slice(tensors, "tail_logp", start, stop))
        violation = find_violation(
            positions, vocab_size=self.manifest.vocab_size, allow_zero=self.manifest.format_version == 1
        )
        if violation is not None:
            raise CacheError(f"{where}: {violation}; {_RERUN}.")
        return positions

    def sweep(self) -> Iterator[StoredPositions]:
        """All positions of the retain shards in order, at most 2^16 at a time."""
        for shard in self.manifest.shards:
            for start in range(0, shard.positions, _SWEEP_POSITIONS):
                yield self.positions(shard, start, min(start + _SWEEP_POSITIONS, shard.positions))

    def target_logp(self, shard: Shard, start: int, stop: int) -> np.ndarray:
        """Log-probabilities `start` to `stop` of a forget shard, in nats: [stop - start] float32.

        Raises CacheError if one of them is not finite or above 0.
        """
        values = _slice(self._tensors(shard), "target_logp", start, stop)
        invalid = ~(np.isfinite(values) & (values <= MAX_LOGP))
        if invalid.any():
            raise CacheError(
                f"{self.folder / shard.file}: target_logp {start + int(invalid.argmax())} is {values[invalid][0]}, "
                f"which is not the logarithm of a probability above 0; {_RERUN}."
            )
        return values

    def _tensors(self, shard: Shard) -> Any:
        """The memory-mapped tensors of a shard whose checksum and header are right."""
        if shard.file not in self._opened:
            self._opened[shard.file] = self._open(shard)
        return self._opened[shard.file]

    def _open(self, shard: Shard) -> Any:
        path = self.folder / shard.file
        if path.is_symlink() or not path.is_file():
            raise CacheError(f"{path} is missing: {_RERUN}.")
        if path.stat().st_size != shard.bytes or file_sha256(path) != shard.sha256:
            raise CacheError(f"{path} is damaged: its checksum differs; {_RERUN}.")

        try:
            tensors = safe_open(path, framework="np")
            header = _header(tensors)
        except Exception as error:
            raise CacheError(f"{path} is not a readable safetensors file ({first_line(error)}); {_RERUN}.") from error
        if header != self._expected_header(shard, header):
            listed = [f"{name!r} {dtype} {shape}" for name, (dtype, shape) in sorted(header.items())][:5]
            raise CacheError(
                f"{path} holds {', '.join(listed) or 'no tensor'}, which are not the tensors of a cache shard; "
                f"{_RERUN}."
            )
        return tensors

    def _expected_header(self, shard: Shard, header: Header) -> Header:
        """The header that a shard must have. Only the number of entries is taken from `header`, its actual one."""
        if shard in self.manifest.forget_shards:
            return {"target_logp": ("F32", [shard.positions])}
        entries = header["ids"][1] if "ids" in header else []
        if len(entries) != 1:
            return {}
        return {
            "offsets": ("I64", [shard.positions + 1]),
            "ids": (_ID_DTYPES[id_dtype(self.manifest.vocab_size)], entries),
            "scaled_p": (STORED_DTYPES[self.manifest.stored_dtype], entries),
            "tail_logp": ("F32", [shard.positions]),
        }


def _header(tensors: Any) -> Header:
    slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
    return {name: (part.get_dtype(), list(part.get_shape())) for name, part in slices.items()}


def _slice(tensors: Any, name: str, start: int, stop: int) -> np.ndarray:
    """tensors[name][start:stop]. safetensors itself refuses an empty slice at the end of a tensor."""
    part: np.ndarray = tensors.get_slice(name)[start:stop] if start < stop else tensors.get_tensor(name)[:0]
    return part

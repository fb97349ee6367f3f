"""Read a teacher cache: the positions of any examples, in any order, memory-mapped and checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from neko_lean.cache import compatibility, verification
from neko_lean.cache.invariants import StoredPositions
from neko_lean.cache.manifest import read_manifest
from neko_lean.cache.shards import Location, ShardReader, locate_rows
from neko_lean.data import EncodedExample, Example
from neko_lean.errors import CacheError
from neko_lean.models import ModelIdentity
from neko_lean.outputs import MANIFEST


class TeacherCache:
    """The examples of a cache folder. Shards are opened when they are first needed.

    Args:
        folder: folder that `cache_teacher` wrote.

    Raises:
        CacheError: if the folder is not a complete cache of a readable format version.

    Example::

        cache = TeacherCache("cache/")
        cache.check(identify(model, tokenizer), style="plain", max_length=512, encoded=examples)
        topk_ids, topk_logp, tail_logp = cache.read(examples[:8])
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            problem = "is not a folder" if self.folder.exists() else "does not exist"
            raise CacheError(f"{self.folder} {problem}; expected a teacher cache: make it with cache-teacher.")
        self.manifest = read_manifest(self.folder / MANIFEST)
        self._shards = ShardReader(self.folder, self.manifest)
        self._retain = locate_rows(self.manifest.shards)
        self._forget = locate_rows(self.manifest.forget_shards)

    def check(self, model: ModelIdentity, *, style: str, max_length: int, encoded: Sequence[EncodedExample]) -> None:
        """Check that the cache was made from the model, prompt format and examples that it is used with.

        Args:
            model: the model to unlearn.
            style: prompt format of the recipe.
            max_length: number of tokens that the recipe truncates examples to. It may be lower than the cache's.
            encoded: the retain examples.

        Raises:
            CacheError: names the first difference.
        """
        compatibility.check_model(self.folder, self.manifest, model)
        self.check_format(style)
        compatibility.check_examples(self.folder, self.manifest, self._retain, encoded, max_length)

    def refuse_shots(self) -> None:
        """Raise CacheError if the teacher read other examples before the forget questions, as a base cache's may."""
        compatibility.refuse_shots(self.folder, self.manifest)

    def check_tokenizer(self, fingerprint: str) -> None:
        """Raise CacheError unless the cache was made with the tokenizer of this fingerprint."""
        compatibility.check_tokenizer(self.folder, self.manifest, fingerprint)

    def check_format(self, style: str) -> None:
        """Raise CacheError unless the cache's examples have this prompt format."""
        compatibility.check_format(self.folder, self.manifest, style)

    def check_vocabulary(self, size: int) -> None:
        """Raise CacheError unless the teacher's head had `size` rows."""
        compatibility.check_vocabulary(self.folder, self.manifest, size)

    def verify(self) -> None:
        """Check every checksum and number, the manifest's totals, and that the folder contains no other files.

        Raises:
            CacheError: names the first file in which something is wrong.
        """
        self.verify_numbers()
        verification.verify_files(self._shards)

    def verify_numbers(self) -> None:
        """Like `verify`, but ignores other files in the folder."""
        verification.verify_numbers(self._shards)

    def sweep(self) -> Iterator[StoredPositions]:
        """All positions of the retain shards in order, some at a time."""
        return self._shards.sweep()

    def read(self, examples: Sequence[EncodedExample]) -> tuple[Tensor, Tensor, Tensor]:
        """Read the stored distributions of some examples, in the form that `token_stats` takes.

        Args:
            examples: examples whose texts `check` has compared with the cache, with N tokens in total.

        Returns:
            topk_ids [N, k] int64, topk_logp [N, k] float32 (-inf for unused entries) and tail_logp [N] float32, with
            one example after another. The probabilities of each position sum to 1 - exp(tail_logp).

        Raises:
            CacheError: if the cache does not contain these positions, or a shard is damaged.
        """
        parts = [self._read_example(example.example, len(example)) for example in examples]

        # Pad the entries of all examples to the same k.
        k = max((ids.shape[1] for ids, _, _ in parts), default=0)
        topk_ids = torch.zeros((sum(len(tail) for _, _, tail in parts), k), dtype=torch.int64)
        topk_logp = torch.full(topk_ids.shape, -torch.inf)
        start = 0
        for ids, logp, _ in parts:
            rows, width = slice(start, start + len(ids)), ids.shape[1]
            topk_ids[rows, :width] = torch.from_numpy(ids)
            topk_logp[rows, :width] = torch.from_numpy(logp)
            start = rows.stop
        return topk_ids, topk_logp, torch.from_numpy(np.concatenate([tail for _, _, tail in parts]))

    def has_target_logp(self, example: EncodedExample) -> bool:
        """Whether the cache stores the teacher's log-probabilities of this example's tokens."""
        return example.example.digest in self._forget.get(example.example.id, {})

    def target_logp(self, example: EncodedExample) -> np.ndarray:
        """The teacher's log-probability, in nats, of every token of an example except the first.

        Only forget examples, their refusals and the anchor have them.

        Returns:
            [len(example) - 1] float32.

        Raises:
            CacheError: if the cache was made without them, or from another text.
        """
        row_id = example.example.id
        candidates = self._forget.get(row_id)
        if candidates is None:
            raise CacheError(f"{self.folder} holds no token losses of row {row_id!r}: cache it with --forget.")

        needed, location = len(example) - 1, candidates.get(example.example.digest)
        if location is None or not needed <= location.positions <= max(0, needed + example.num_truncated):
            raise CacheError(
                f"{self.folder}: row {row_id!r} has another text or other tokens, or was truncated further."
            )
        return self._shards.target_logp(location.shard, location.start, location.start + needed)

    def _read_example(self, example: Example, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The first `count` positions of an example: ids [n, k], logp [n, k] and tail_logp [n]."""
        location = self._locate(example)
        if location is None or location.positions < count:
            raise CacheError(f"{self.folder} does not hold {count} positions of row {example.id!r}.")
        sizes, flat_ids, flat_p, tail = self._shards.positions(location.shard, location.start, location.start + count)

        # Unpack the entries into a rectangle.
        used = np.arange(sizes.max(initial=1))[None] < sizes[:, None]  # [n, k]
        ids = np.zeros(used.shape, dtype=np.int64)
        p = np.zeros(used.shape, dtype=np.float32)
        ids[used], p[used] = flat_ids, flat_p

        # Rescale the entries of each position to sum to 1 - exp(tail), which removes the rounding of large ones.
        with np.errstate(divide="ignore"):  # log(0) is the -inf that marks an unused entry
            log_mass = np.log(-np.expm1(tail))[:, None]
            logp = np.log(p) - np.log(p.sum(1, keepdims=True)) + log_mass
        return ids, logp, tail

    def _locate(self, example: Example) -> Location | None:
        """Where an example is stored. Texts were compared by `check`: the digest only separates examples of one id."""
        candidates = self._retain.get(example.id, {})
        return next(iter(candidates.values())) if len(candidates) == 1 else candidates.get(example.digest)

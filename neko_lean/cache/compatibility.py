"""Check that a cache was made from the model, the prompt format and the examples that it is used with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from neko_lean.cache.format import Manifest
from neko_lean.cache.shards import Locations
from neko_lean.data import EncodedExample
from neko_lean.errors import CacheError
from neko_lean.models import ModelIdentity, config_differences
from neko_lean.terminal import log_line


def check_model(folder: Path, manifest: Manifest, model: ModelIdentity) -> None:
    """Raise CacheError unless the cache's teacher has the same weights, tokenizer and config as `model`."""
    if manifest.weights != model.weights:
        raise CacheError(
            f"{folder} was made with another model ({manifest.model}): run cache-teacher on the model that you unlearn."
        )
    check_tokenizer(folder, manifest, model.tokenizer)

    if manifest.config is None and model.config is not None:
        log_line(
            f"warning: {folder} may have been made with another config.json, because caches of format 1 record only "
            f"the weights; run cache-teacher again to be sure."
        )
    if manifest.config is None or model.config is None:
        return
    changed = config_differences(manifest.config, model.config)
    if changed:
        raise CacheError(
            f"{folder} was made by a model of the same weights with another {', '.join(changed)} in its config.json: "
            f"run cache-teacher again, or use the config.json that belongs to the weights."
        )


def refuse_shots(folder: Path, manifest: Manifest) -> None:
    """Raise CacheError if the teacher read other examples before the forget questions."""
    if manifest.shots:
        raise CacheError(
            f"{folder} was made with --shots, so it can only be a --base-cache: run cache-teacher without --shots on "
            f"the model that you unlearn."
        )


def check_tokenizer(folder: Path, manifest: Manifest, fingerprint: str) -> None:
    """Raise CacheError unless the cache was made with the tokenizer of this fingerprint."""
    if manifest.tokenizer != fingerprint:
        raise CacheError(f"{folder} was made with another tokenizer: run cache-teacher again.")


def check_format(folder: Path, manifest: Manifest, style: str) -> None:
    """Raise CacheError unless the cache's examples have the prompt format `style`."""
    if manifest.format != style:
        raise CacheError(
            f"{folder} was made in prompt format {manifest.format!r}, but this run uses {style!r}: "
            f"{_format_hint(style)}."
        )


def _format_hint(style: str) -> str:
    """How to make a cache in a prompt format. The digest after the colon identifies template and system message."""
    name, separator, _ = style.partition(":")
    if not separator:
        return f"run cache-teacher with --format {name}"
    return "run cache-teacher again with the --format, the --system and the chat template of this run"


def check_vocabulary(folder: Path, manifest: Manifest, size: int) -> None:
    """Raise CacheError unless the teacher's head had `size` rows."""
    if manifest.vocab_size != size:
        raise CacheError(
            f"{folder} was made by a model with {manifest.vocab_size} tokens in its vocabulary, but this model has "
            f"{size}: run cache-teacher again."
        )


def check_examples(
    folder: Path, manifest: Manifest, locations: Locations, examples: Sequence[EncodedExample], max_length: int
) -> None:
    """Raise CacheError unless the cache stores every position of these examples.

    The cache may store more positions than an example has now: a causal teacher's first positions do not depend on the
    rest.

    Args:
        folder: the cache folder, for error messages.
        manifest: its manifest.
        locations: where its retain examples are stored.
        examples: retain examples, as the recipe tokenizes them.
        max_length: number of tokens that the recipe truncates them to.
    """
    for example in examples:
        row_id, digest = example.example.id, example.example.digest
        candidates = locations.get(row_id)
        if candidates is None and example.num_context:
            raise CacheError(
                f"{folder} stores no window {row_id!r}, because it splits documents at {manifest.max_length} tokens, "
                f"but the recipe at {max_length}: run cache-teacher with --max-length {max_length}."
            )
        if candidates is None:
            raise CacheError(f"{folder} was made from another retain file: it lacks row {row_id!r}.")
        if digest not in candidates:
            raise CacheError(f"{folder} was made from another retain file: the text of row {row_id!r} differs.")

        stored, needed = candidates[digest].positions, len(example)
        untruncated = needed + example.num_truncated + example.num_following
        if stored > untruncated:
            raise CacheError(
                f"{folder} stores at least {stored} tokens of row {row_id!r}, which has only {untruncated} tokens now, "
                f"so another version of neko-lean made it; run cache-teacher again."
            )
        if stored < needed <= manifest.max_length:
            raise CacheError(
                f"{folder} stores {stored} positions of row {row_id!r}, but the recipe reads {needed}: a cache has no "
                f"EOS token after an answer, so set append_eos=false."
            )
        if stored < needed:
            raise CacheError(
                f"{folder} was truncated to {manifest.max_length} tokens, but the recipe reads {max_length}: run "
                f"cache-teacher with --max-length {max_length}."
            )

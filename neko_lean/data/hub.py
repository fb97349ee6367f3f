"""Data sets on the Hugging Face hub, read with the optional package datasets (`pip install 'neko-lean[hub]'`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from neko_lean.errors import NekoLeanError, first_line
from neko_lean.extras import require_extra

_NAME = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<config>[\w.-]+))?(/(?P<split>\w[\w.\[\]:%+-]*))?", re.ASCII
)
_FILE_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".txt", ".md", ".gz", ".zip")


class HubName(NamedTuple):
    """A data set on the hub, written `owner/name[:config][/split]`."""

    name: str
    config: str | None
    split: str | None


def parse_hub_name(source: str | Path) -> HubName | None:
    """The data set that `source` names, or None if it can only be a path.

    A path that exists, or whose first folder exists, never names a data set. Neither does a name that ends like a file.
    """
    text = str(source)
    match = _NAME.fullmatch(text)
    if match is None or text.lower().endswith(_FILE_SUFFIXES):
        return None
    if Path(text).exists() or Path(text).parts[0] in ("..", ".") or Path(Path(text).parts[0]).exists():
        return None
    return HubName(match["name"], match["config"], match["split"])


def require_hub_package(*sources: object) -> None:
    """Raise NekoLeanError if one of the sources names a data set on the hub and the package datasets is missing."""
    for source in sources:
        if isinstance(source, str | Path) and parse_hub_name(source) is not None:
            require_extra("datasets", "hub", f"{source} does not exist as a path; reading it from the hub")


def load_hub_rows(hub: HubName, stem: str = "", split: str | None = None) -> Iterable[Any]:
    """Load a split of a data set. Code in the data set's repository is never executed.

    The offline mode of the hub's libraries (HF_HUB_OFFLINE=1, HF_DATASETS_OFFLINE=1) is respected.

    Args:
        hub: The data set.
        stem: If `hub` states no split, the split to read, such as "forget". A data set with one split needs no name.
        split: Read `<stem>_<split>` instead of `<stem>`.

    Raises:
        NekoLeanError: If datasets is not installed, the data set cannot be loaded, or its split is unclear.
    """
    source = hub.name + (f":{hub.config}" if hub.config else "")
    require_hub_package(hub.name)
    import datasets

    try:
        loaded: Any = datasets.load_dataset(hub.name, hub.config, split=hub.split)
    except Exception as error:  # the hub's libraries raise many types, and so do the readers of the data set's format
        raise NekoLeanError(
            f"{source} is not a path and cannot be loaded from the Hugging Face hub ({first_line(error).rstrip('.')}); "
            f"expected owner/name[:config][/split]."
        ) from error
    if not isinstance(loaded, Mapping):
        return loaded  # type: ignore[no-any-return]

    name = f"{stem}_{split}" if split else stem
    if name in loaded:
        return loaded[name]  # type: ignore[no-any-return]
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    raise NekoLeanError(f"{source} has the splits {', '.join(loaded)}; append one of them, such as {source}/train.")

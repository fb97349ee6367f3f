"""The exceptions of neko-lean. A NekoLeanError is for users: one sentence, exit code 2, and no traceback."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType


class NekoLeanError(Exception):
    """An error that the user can fix.

    Its message is one sentence that names what is wrong and how to fix it. The command line prints nothing else.
    """


class CacheError(NekoLeanError):
    """A teacher cache is damaged or unreadable, or does not belong to the model or the data it is used with."""


class UnpublishedError(NekoLeanError):
    """A result is complete but could not be moved to its destination.

    The message says where the result is. No cleanup may remove it.
    """


class NonFiniteError(Exception):
    """A loss or a gradient is NaN or infinite."""


class PartialStepError(Exception):
    """The GPU ran out of memory after an optimizer step had updated some weights but not all."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run.

    It derives from KeyboardInterrupt, so that no `except Exception` handles it as an ordinary error.

    Attributes:
        number: The signal's number.
        saved_state: What was saved for `--resume`, as a clause for the message, or None if nothing was.
    """

    def __init__(self, number: int, when: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} {when}")
        self.number = number
        self.saved_state: str | None = None


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or the exception's type if it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


# What others call a name, in lower case with hyphens, and our names for it.
Synonyms = Mapping[str, Sequence[str]]
NO_SYNONYMS: Synonyms = MappingProxyType({})


def closest_names(name: str, names: Iterable[str], synonyms: Synonyms = NO_SYNONYMS) -> list[str]:
    """The known names that an unknown one probably means, if any.

    Case, hyphens and underscores do not matter. A synonym counts before a similar spelling.

    Args:
        name: the unknown name.
        names: the known names.
        synonyms: what others call a name, in lower case with hyphens, and our names for it.
    """
    names = list(names)
    simple = _simplified(name)
    same = [known for known in names if _simplified(known) == simple]
    return same or list(synonyms.get(simple, ())) or difflib.get_close_matches(name.lower(), names, n=1)


def did_you_mean(name: str, names: Iterable[str], synonyms: Synonyms = NO_SYNONYMS) -> str:
    """The end of an error message about an unknown name. The arguments are those of `closest_names`.

    Returns:
        "; did you mean 'lr'?" with the closest of `names`, or "; choose from a, b." if none is close.
    """
    names = list(names)
    closest = closest_names(name, names, synonyms)
    return f"; did you mean {' or '.join(map(repr, closest))}?" if closest else f"; choose from {', '.join(names)}."


def _simplified(name: str) -> str:
    return name.lower().replace("_", "-")

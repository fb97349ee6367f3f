"""Optional packages: an error before any work if one that a command will need is missing."""

from __future__ import annotations

import importlib.util
import sys

from neko_lean.errors import NekoLeanError


def require_extra(package: str, extra: str, purpose: str) -> None:
    """Raise NekoLeanError if an optional package is not installed. The package is not imported.

    Args:
        package: the package's import name.
        extra: the extra of neko-lean that installs it.
        purpose: what needs it, as the subject of the message.
    """
    is_imported = sys.modules.get(package) is not None
    if not is_imported and importlib.util.find_spec(package) is None:
        raise NekoLeanError(
            f"{purpose} needs the package {package}, which is not installed; run pip install 'neko-lean[{extra}]'."
        )

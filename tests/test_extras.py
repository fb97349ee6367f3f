"""Optional packages that are missing: the sentence says how to install them."""

import sys
from types import SimpleNamespace

import pytest

from neko_lean.errors import NekoLeanError
from neko_lean.extras import require_extra


def test_a_missing_package_is_named_with_the_extra_that_installs_it():
    with pytest.raises(NekoLeanError, match=r"^--x needs the package no_such_package, .*'neko-lean\[thing\]'\.$"):
        require_extra("no_such_package", "thing", "--x")


def test_an_installed_package_is_not_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "this", raising=False)
    require_extra("this", "thing", "--x")
    assert "this" not in sys.modules
    monkeypatch.setitem(sys.modules, "made_up", SimpleNamespace())
    require_extra("made_up", "thing", "--x")
    monkeypatch.setitem(sys.modules, "made_up", None)
    with pytest.raises(NekoLeanError, match="made_up"):
        require_extra("made_up", "thing", "--x")

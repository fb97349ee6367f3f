"""Every `>>>` example in a docstring of the package runs and prints what it claims."""

import doctest
import importlib
import pkgutil

import pytest

import neko_lean

# Importing `neko_lean.__main__` would start the command line.
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(neko_lean.__path__, "neko_lean.")
    if not module.name.endswith("__main__")
)
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
# Modules whose entry points have a runnable example.
WITH_EXAMPLES = {
    "neko_lean.data.batching",
    "neko_lean.data.examples",
    "neko_lean.data.tokenization",
    "neko_lean.models.chunked_head",
    "neko_lean.training.optimizer",
}


def test_modules_are_found():
    assert {*MODULES} >= WITH_EXAMPLES


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, tmp_path, monkeypatch):
    """Examples run in an empty folder, so that an example that writes files leaves nothing in the checkout."""
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=OPTIONS)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples in {name} failed; see the output above"
    assert result.attempted or name not in WITH_EXAMPLES, f"{name} has no example"

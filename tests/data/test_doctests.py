"""The examples in docstrings run and print what they claim."""

import doctest

import pytest

from neko_lean.data import batching, examples, tokenization


@pytest.mark.parametrize("module", [batching, examples, tokenization], ids=lambda module: module.__name__)
def test_docstring_examples(module):
    failed, attempted = doctest.testmod(module)
    assert attempted and not failed

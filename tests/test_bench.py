"""The benches, which the suite does not run, import what exists and call it with arguments that it takes."""

import ast
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


def imported(tree: ast.Module) -> dict[str, object]:
    """What a file imports from neko_lean, by the names that it uses. Raises AttributeError if one does not exist."""
    found: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "neko_lean":
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
                found[alias.asname or alias.name] = getattr(module, alias.name)
    return found


def check_call(call: ast.Call, function: Callable[..., object]) -> None:
    """Raise TypeError if the function would refuse the call's arguments. What a * or ** stands for is unknown."""
    if isinstance(function, type) and issubclass(function, Exception):
        return  # inspect finds no signature of a class that inherits only from Exception
    signature = inspect.signature(function)
    positional = [None for argument in call.args if not isinstance(argument, ast.Starred)]
    keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
    complete = len(positional) == len(call.args) and len(keywords) == len(call.keywords)
    (signature.bind if complete else signature.bind_partial)(*positional, **keywords)


@pytest.mark.parametrize("name", sorted(file.name for file in BENCH.glob("*.py")))
def test_a_bench_calls_what_exists(name):
    tree = ast.parse((BENCH / name).read_text())
    found = imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and callable(found.get(node.func.id)):
            try:
                check_call(node, found[node.func.id])
            except TypeError as error:
                pytest.fail(f"bench/{name}, line {node.lineno}: {node.func.id}: {error}")

"""Packages import in one direction: only from packages before them in the order that docs/architecture.md states."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "neko_lean"
ORDER = [
    "errors", "extras", "options", "jsonio", "distributed", "terminal", "outputs", "data", "models", "cache",
    "objectives", "recipe", "checkpoints", "training", "memory", "runs", "scoring", "reporting", "demo", "cli",
]  # fmt: skip


def imported_packages(file: Path) -> set[str]:
    """Top-level names inside neko_lean that a file imports, wherever in the file it does."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            parts = node.module.split(".")
            if parts[0] == "neko_lean":
                names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("neko_lean.")}
    return names


@pytest.mark.parametrize("name", ORDER)
def test_a_package_imports_only_from_packages_before_it(name):
    folder = PACKAGE / name
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    assert files
    for file in files:
        later = imported_packages(file) - {name, "__version__"} - set(ORDER[: ORDER.index(name)])
        assert not later, f"{file.relative_to(ROOT)} imports {', '.join(sorted(later))}, which come after {name}"


def test_every_package_has_its_place_in_the_order():
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert found - {"__init__", "__main__", "__pycache__"} == set(ORDER)


def test_modules_within_a_package_do_not_import_each_other_in_a_circle():
    edges = {}
    for file in PACKAGE.rglob("*.py"):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        edges[module] = {
            node.module
            for node in ast.parse(file.read_text()).body
            if isinstance(node, ast.ImportFrom) and node.module and node.module.count(".") >= 2
        }
    finished, path = set(), []

    def visit(module: str) -> None:
        assert module not in path, f"import cycle: {' -> '.join([*path[path.index(module) :], module])}"
        if module in finished or module not in edges:
            return
        path.append(module)
        for target in sorted(edges[module]):
            visit(target)
        finished.add(path.pop())

    for module in sorted(edges):
        visit(module)


def test_the_documented_order_is_this_one():
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = page.split("| package | contents |")[1].split("\n\n")[0]
    documented = [
        name.rstrip("/") for row in re.findall(r"^\|([^|]+)\|", table, re.M) for name in re.findall(r"`(\S+?)`", row)
    ]
    assert documented == ORDER

"""Read recipe files: inheritance, overrides, types."""

from __future__ import annotations

import dataclasses
import math
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neko_lean.errors import NekoLeanError, closest_names, did_you_mean
from neko_lean.objectives import FORGET_OBJECTIVES
from neko_lean.options import DEFAULT_RECIPE
from neko_lean.recipe.checks import check
from neko_lean.recipe.effects import has_effect, hyperparameter_names, refuse_without_effect
from neko_lean.recipe.recipe import Recipe
from neko_lean.recipe.synonyms import KEY_SYNONYMS, NAME_SYNONYMS

DEFAULT = DEFAULT_RECIPE
FOLDER = Path(__file__).parent
BASE = "base"  # what every recipe inherits in the end; not a recipe itself
NUMBER_OR_WORD = "float | str"
_NOT_INHERITED = ("name", "summary")


def recipe_names() -> list[str]:
    """Names of the recipes that ship with neko-lean."""
    return sorted(path.stem for path in FOLDER.glob("*.toml") if path.stem != BASE)


def recipes() -> dict[str, Recipe]:
    """The recipes that ship with neko-lean, by name.

    Example:
        >>> recipes()["neko"].forget_objective
        'ga'
    """
    return {name: load_recipe(name) for name in recipe_names()}


def recipe_keys() -> list[str]:
    """The keys that `--set` takes."""
    return [key for key in _types() if key not in (*_NOT_INHERITED, "base")]


def load_recipe(name: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Load a recipe.

    A recipe file states what is its own. It inherits everything else from the recipe that it names as `base` (a shipped
    one, or a .toml file relative to its own folder), and in the end from base.toml.

    Args:
        name: name of a shipped recipe, or path of a .toml file.
        overrides: values that replace the file's, by key.

    Raises:
        NekoLeanError: unknown recipe, unreadable file, unknown key, a value of the wrong type or range, or a key that
            has no effect given the others.

    Example:
        >>> recipe = load_recipe("npo", {"lr": 1e-5})
        >>> recipe.forget_objective, recipe.lr, recipe.hyperparameters
        ('npo', 1e-05, {'beta': 0.1})
    """
    path = _find(name, Path())
    inherited, own = _read(path, ())
    changed = _typed_values(path.stem, overrides or {})
    in_file = _merge(inherited, own)

    # The file is checked by itself first, so that a fault in it is not blamed on an override.
    refuse_without_effect(_build(path.stem, in_file), own, in_file=True)
    recipe = _build(path.stem, _merge(in_file, changed))
    refuse_without_effect(recipe, changed, in_file=False)
    return check(_reset_without_effect(recipe))


def parse_override(text: str) -> tuple[str, Any]:
    """Parse KEY=VALUE: 'lr=1e-5' -> ('lr', 1e-05). A value that is not TOML is a string."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise NekoLeanError(f"--set must be key=value, got {text!r}.")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested thousands deep
        raise NekoLeanError(f"--set {key.strip()}: the value is not readable TOML ({error}).") from error


def _find(name: str | Path, folder: Path) -> Path:
    """The file of a recipe; a .toml path is relative to `folder`."""
    path = folder / name if str(name).endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file() or path == FOLDER / f"{BASE}.toml":
        if str(name).endswith(".toml"):
            meant = closest_names(path.stem, recipe_names())
            shipped = f"; the shipped recipe is named {meant[0]}, without .toml" if meant else ""
            raise NekoLeanError(f"recipe file {path} does not exist{shipped}; expected a file, or a shipped recipe.")
        raise NekoLeanError(f"unknown recipe {str(name)!r}{did_you_mean(str(name), recipe_names(), NAME_SYNONYMS)}")
    return path


def _read(path: Path, children: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a recipe file inherits, and what it states itself."""
    values = _typed_values(path.stem, _toml(path))
    base = values.pop("base", None)
    if base is None:
        inherited = _typed_values(BASE, _toml(FOLDER / f"{BASE}.toml"))
    else:
        parent = _find(base, path.parent)
        if parent.resolve() in (*children, path.resolve()):
            raise NekoLeanError(f"recipe file {path}: base {base!r} inherits from this file itself.")
        inherited = _merge(*_read(parent, (*children, path.resolve())))
    return {key: value for key, value in inherited.items() if key not in _NOT_INHERITED}, values


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise NekoLeanError(f"{path} is not readable TOML: {error}.") from error


def _typed_values(recipe: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with their types checked. Raises NekoLeanError for an unknown key."""
    types = _types()
    for key in values:
        if key not in types:
            raise NekoLeanError(f"recipe {recipe}: unknown key {key!r}{did_you_mean(key, types, KEY_SYNONYMS)}")
    return {key: _typed(recipe, key, value, types[key]) for key, value in values.items()}


def _types() -> dict[str, str]:
    types = {field.name: str(field.type) for field in dataclasses.fields(Recipe) if field.name != "hyperparameters"}
    return types | dict.fromkeys(hyperparameter_names(), "float") | {"base": "str"}


def _typed(recipe: str, key: str, value: Any, type_name: str) -> Any:
    if type_name == NUMBER_OR_WORD:
        type_name = "str" if isinstance(value, str) else "float"
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if type_name == "float" and is_integer and abs(value) <= sys.float_info.max:
        value = float(value)
    if type(value).__name__ != type_name:
        expected = "true or false" if type_name == "bool" else f"of type {type_name}"
        raise NekoLeanError(f"recipe {recipe}: {key} must be {expected}, got {str(value)[:60]!r}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise NekoLeanError(f"recipe {recipe}: {key} must be finite, got {value}.")
    return value


def _merge(parent: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
    """The parent's values with the child's replacing them. Another forget objective keeps none of the parent's
    hyperparameters, which were not meant for it."""
    values = dict(parent)
    if child.get("forget_objective", values.get("forget_objective")) != values.get("forget_objective"):
        values = {key: value for key, value in values.items() if key not in hyperparameter_names()}
    return {**values, **child}


def _build(name: str, values: Mapping[str, Any]) -> Recipe:
    """Build a recipe; `hyperparameters` holds those of its objective only."""
    objective = FORGET_OBJECTIVES.get(values["forget_objective"])
    declared = objective.hyperparameters if objective is not None else {}
    hyperparameters = {key: values.get(key, parameter.default) for key, parameter in declared.items()}
    fields = {key: value for key, value in values.items() if key not in hyperparameter_names()}
    return Recipe(**{"name": name, "summary": "", **fields, "hyperparameters": hyperparameters})


def _reset_without_effect(recipe: Recipe) -> Recipe:
    """The recipe with base.toml's value for every key that has no effect, so that run.json does not suggest one."""
    base = _typed_values(BASE, _toml(FOLDER / f"{BASE}.toml"))
    return dataclasses.replace(recipe, **{key: value for key, value in base.items() if not has_effect(key, recipe)})

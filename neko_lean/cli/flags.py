"""Turn the fields of options dataclasses into command-line options, so that each option is declared once."""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer


def signature_with_flags(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of a command function, with each parameter that is a dataclass replaced by that class's fields."""
    hints = get_type_hints(function, include_extras=True)
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        annotation = hints[parameter.name]
        if dataclasses.is_dataclass(annotation):
            parameters += _flags_of(annotation)
        else:
            parameters.append(parameter.replace(annotation=annotation, kind=inspect.Parameter.KEYWORD_ONLY))
    return inspect.Signature(parameters)


def collect_flags(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a command function, from the values of the options in `signature_with_flags`."""
    hints = get_type_hints(function, include_extras=True)
    arguments = dict(values)
    for name, annotation in hints.items():
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            fields = {field.name: arguments.pop(field.name) for field in dataclasses.fields(annotation)}
            # Repeatable options arrive as lists, and as None when they were not given.
            is_repeatable = {key: _is_repeatable(kind) for key, kind in get_type_hints(annotation).items()}
            fields = {key: tuple(value or ()) if is_repeatable[key] else value for key, value in fields.items()}
            arguments[name] = annotation(**fields)
    return arguments


def flag_of(field: dataclasses.Field[Any]) -> str:
    """The command-line option of a dataclass field, such as --batch-size."""
    flags: tuple[str, ...] = field.metadata.get("flags", (f"--{field.name.replace('_', '-')}",))
    return flags[0]


def _flags_of(kind: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(kind)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if _is_repeatable(hints[field.name]) else field.default,
            annotation=_annotation(field.name, hints[field.name], field.metadata),
        )
        for field in dataclasses.fields(kind)
    ]


def _annotation(name: str, hint: Any, metadata: Mapping[str, Any]) -> Any:
    """A field's type as typer understands it, with its help text."""
    settings = dict(metadata)
    settings.pop("key", None)
    flags = list(settings.pop("flags", ()))
    if hint is bool and not flags:
        flags = [f"--{name.replace('_', '-')}"]  # without typer's --no-NAME
    if int in (hint, *get_args(hint)):
        settings.setdefault("metavar", "N")
    if _is_repeatable(hint):
        hint = list[str] | None
    elif get_origin(hint) in (Union, types.UnionType) and Path in get_args(hint):
        hint = Path | None
    return Annotated[hint, typer.Option(*flags, **settings)]


def _is_repeatable(hint: Any) -> bool:
    return get_origin(hint) is tuple

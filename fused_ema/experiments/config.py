"""Options of the experiments: fields of dataclasses, with presets, as command-line arguments."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

C = TypeVar("C")


def option(default: Any, text: str, *, choices: Sequence[str] = (), identity: bool = True) -> Any:
    """A field of a config.

    Args:
        default: the value in presets that do not set it.
        text: its description in ``--help``.
        choices: allowed values, for a string.
        identity: whether a continued run must have the same value.
    """
    metadata = {"help": text, "choices": tuple(choices), "identity": identity}
    return dataclasses.field(default=default, metadata=metadata)


def positive(config: Any, *names: str) -> None:
    """Raise ValueError unless the fields, and every value of a tuple, are above 0."""
    for name in names:
        value = getattr(config, name)
        values = value if isinstance(value, tuple) else (value,)
        if not values or not all(v > 0 for v in values):
            raise ValueError(f"{name}={value!r} is out of range; allowed: above 0")


def add_options(parser: argparse._ActionsContainer, presets: Mapping[str, Any]) -> None:
    """Add one argument for each field; its help shows the value in each preset."""
    config = type(next(iter(presets.values())))
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        values = {name: text_of(getattr(preset, field.name)) for name, preset in presets.items()}
        if len(set(values.values())) == 1:
            told = next(iter(values.values()))
        else:
            told = ", ".join(f"{name}: {value}" for name, value in values.items())
        choices = field.metadata["choices"] or names_of(hints[field.name])
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=field.name,
            type=reader(hints[field.name]),
            choices=choices or None,
            default=argparse.SUPPRESS,
            metavar=None if choices else metavar(hints[field.name]),
            help=f"{field.metadata['help']} [{told}]".replace("%", "%%"),
        )


def chosen(presets: Mapping[str, C], preset: str, given: Mapping[str, Any]) -> C:
    """The preset with the values that the command line has replaced."""
    config: Any = presets[preset]
    names = {field.name for field in dataclasses.fields(config)}
    changed = {name: value for name, value in given.items() if name in names}
    result: C = dataclasses.replace(config, **changed)
    return result


def identity(config: Any) -> dict[str, Any]:
    """The fields that determine the results, as JSON reads them back."""
    return {
        field.name: plain(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.metadata["identity"]
    }


def plain(value: Any) -> Any:
    """A field's value in the form that JSON holds."""
    if isinstance(value, tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def text_of(value: Any) -> str:
    """A value in the form of the command line."""
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ",".join(map(text_of, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def reader(kind: Any) -> Callable[[str], Any]:
    """The function that reads a value of a field's type from the command line."""
    if typing.get_origin(kind) is types.UnionType:
        inner = reader(next(arg for arg in typing.get_args(kind) if arg is not type(None)))
        return lambda text: None if text == "none" else inner(text)
    if typing.get_origin(kind) is tuple:
        each = reader(typing.get_args(kind)[0])
        return lambda text: () if text == "none" else tuple(map(each, text.split(",")))
    if names_of(kind):
        return str
    readers: dict[Any, Callable[[str], Any]] = {bool: yes_or_no, float: number}
    reads: Callable[[str], Any] = readers.get(kind, kind)
    return reads


def names_of(kind: Any) -> tuple[str, ...]:
    """The strings of a ``Literal``; none for another type."""
    return typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()


def metavar(kind: Any) -> str:
    """The placeholder for a value in ``--help``."""
    if typing.get_origin(kind) is types.UnionType:
        return metavar(next(arg for arg in typing.get_args(kind) if arg is not type(None)))
    if typing.get_origin(kind) is tuple:
        each = metavar(typing.get_args(kind)[0])
        return f"{each},..."
    return {bool: "YES|NO", int: "N", float: "X", Path: "DIR"}.get(kind, "NAME")


def number(text: str) -> float:
    """Read a number, which may be a fraction: ``1/4``."""
    above, _, below = text.partition("/")
    return float(above) / float(below) if below else float(above)


def yes_or_no(text: str) -> bool:
    """Read a flag's value."""
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are yes and no")
    return text == "yes"

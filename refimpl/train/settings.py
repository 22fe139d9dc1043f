"""The settings of a stage: a frozen dataclass, read from TOML, overridden by ``name=value``, and
written beside the result.

A file has a table per stage, so that one file serves the whole recipe; a file without such tables
is that of one stage. Every field is a number, a text, true or false, a list of these, or a table.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from math import isfinite
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from ..errors import CouldNotRun
from ..files import read_text

__all__ = ["check_types", "expect_setting", "make_settings", "read_tables", "to_toml", "toml_value"]

S = TypeVar("S")


def expect_setting(holds: bool, name: str, wanted: str, got: object) -> None:
    """CouldNotRun ``name must wanted, got got`` unless it holds."""
    if not holds:
        raise CouldNotRun(f"must {wanted}, got {got!r}", argument=name)


def check_types(record: Any) -> None:
    """CouldNotRun unless each field of the dataclass has the type of its annotation, and numbers
    are finite."""
    hints = get_type_hints(type(record))
    for field in fields(record):
        value = getattr(record, field.name)
        expect_setting(
            _is(value, hints[field.name]), field.name, f"be {_told(hints[field.name])}", value
        )
        if isinstance(value, float):
            expect_setting(isfinite(value), field.name, "be finite", value)


def make_settings(
    kind: type[S],
    stage: str,
    tables: Mapping[str, Any],
    overrides: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
) -> S:
    """The settings of ``kind``: its defaults, then the file's table ``stage``, then overrides.

    Args:
        tables: what `read_tables` gives.
        overrides: ``name=value`` each, the value as TOML has it; a bare word is a text.
        options: more of them, by name.

    CouldNotRun names the setting that is unknown or wrong.
    """
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    whole = any(isinstance(x, dict) and name not in names for name, x in tables.items())
    given = dict(tables.get(stage, {}) if whole else tables)
    for override in overrides:
        name, equals, text = override.partition("=")
        expect_setting(bool(equals and name), "set", "be name=value", override)
        *path, last = name.strip().split(".")
        place = given
        for part in path:
            place = place.setdefault(part, {})
            expect_setting(isinstance(place, dict), "set", "name a table's entry", override)
        place[last] = _value(text.strip())
    given |= options or {}
    for name in given:
        if name not in names:
            raise CouldNotRun(
                f"{stage} has no setting {name}; there are {', '.join(sorted(names))}"
            )
    hints = get_type_hints(kind)
    return kind(**{name: _as(value, hints[name]) for name, value in given.items()})


def read_tables(path: Path | None) -> dict[str, Any]:
    """What a TOML file holds; nothing without one. CouldNotRun if it can't be read."""
    if path is None:
        return {}
    try:
        return tomllib.loads(read_text(path, str(path)))
    except tomllib.TOMLDecodeError as error:
        raise CouldNotRun(f"{path} is not TOML: {error}") from error


def to_toml(tables: Mapping[str, Any]) -> str:
    """TOML of dataclasses by their table's name, every setting written; None is left out."""
    lines = []
    for stage, record in tables.items():
        plain = {name: x for name, x in asdict(record).items() if x is not None}
        lines.append(f"[{stage}]")
        lines += [f"{name} = {toml_value(x)}" for name, x in plain.items()]
        lines.append("")
    return "\n".join(lines)


def toml_value(x: Any) -> str:
    if isinstance(x, Mapping):
        return "{ " + ", ".join(f"{key} = {toml_value(value)}" for key, value in x.items()) + " }"
    if isinstance(x, (list, tuple)):
        return "[" + ", ".join(map(toml_value, x)) + "]"
    return json.dumps(x, ensure_ascii=False)  # TOML's numbers, texts and booleans are JSON's


def _value(text: str) -> Any:
    """A value as TOML has it, or else the text."""
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def _as(value: Any, hint: Any) -> Any:
    """TOML's lists as tuples, and its integers as floats where these are wanted."""
    if isinstance(value, list):
        return tuple(_as(x, (get_args(hint) or (Any,))[0]) for x in value)
    kinds = get_args(hint) if get_origin(hint) not in (tuple, dict) else ()
    if type(value) is int and float in (hint, *kinds) and int not in (hint, *kinds):
        return float(value)
    return value


def _is(value: Any, hint: Any) -> bool:
    origin, inside = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is tuple:
        return isinstance(value, tuple) and all(_is(x, inside[0]) for x in value)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if inside:  # a union
        return any(_is(value, kind) for kind in inside)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint if hint is not NoneType else value is None


def _told(hint: Any) -> str:
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
    if hint in names:
        return names[hint]
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return names.get(kinds[0], "a list or a table") if kinds else "a list or a table"

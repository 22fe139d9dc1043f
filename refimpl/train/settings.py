"""The settings of a stage: a frozen dataclass, read from TOML, overridden by ``name=value``, and
written beside the result.

A file has a table per stage, so that one file serves the whole recipe; a file without such tables
is that of one stage. Every field is a number, a text, true or false, a list of these, or a table.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, fields
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from ..errors import CouldNotRun
from ..files import read_text

__all__ = [
    "NAMES",
    "check_types",
    "expect_setting",
    "make_settings",
    "possible",
    "read_tables",
    "to_toml",
    "toml_value",
]

S = TypeVar("S")
NAMES = ("train", "extend", "sft", "grpo", "reward-model", "distil")  # of the stages
BARE = re.compile("[A-Za-z0-9_-]+")  # a key that TOML does not quote
TOLD = {int: "an integer", float: "a number", str: "a text", bool: "true or false", tuple: "a list"}


def expect_setting(holds: bool, name: str, wanted: str, got: object) -> None:
    """CouldNotRun ``name must wanted, got got`` unless it holds."""
    if not holds:
        raise CouldNotRun(f"must {wanted}, got {got!r}", argument=name)


@contextmanager
def possible() -> Iterator[None]:
    """CouldNotRun for a ValueError inside: there, settings make a model, an optimizer, or data."""
    try:
        yield
    except ValueError as error:
        raise CouldNotRun(f"impossible settings: {error}") from error


def check_types(record: Any) -> None:
    """CouldNotRun unless each field of the dataclass has the type of its annotation, numbers are
    finite, and texts are UTF-8."""
    hints = get_type_hints(type(record))
    for field in fields(record):
        name, hint = field.name, hints[field.name]
        value = getattr(record, name)
        told = TOLD.get(get_origin(hint) or hint, "a table")
        if inside := get_args(hint)[:1] if told == "a list" else ():
            told += f" whose entries are each {TOLD[inside[0]]}"
        expect_setting(_is(value, hint), name, f"be {told}", value)
        _check_plain(name, value)


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
        overrides: ``name=value`` each, the value as TOML has it; what is not TOML is a text.
        options: more of them, by name.

    CouldNotRun names the setting that is unknown or wrong.
    """
    given = deepcopy(dict(_table(stage, tables)))
    for override in overrides:
        name, equals, text = override.partition("=")
        expect_setting(bool(equals and name.strip()), "set_", "be name=value", override)
        *path, last = name.strip().split(".")
        place = given
        for part in path:
            place = place.setdefault(part, {})
            expect_setting(isinstance(place, dict), "set_", "name a table's entry", override)
        place[last] = _value(text.strip())
    given |= options or {}
    hints = get_type_hints(kind)
    for name in given:
        if name not in hints:
            raise CouldNotRun(
                f"{stage} has no setting {name}; there are {', '.join(sorted(hints))}"
            )
    return kind(**{name: _as(value, hints[name]) for name, value in given.items()})


def read_tables(path: Path | None) -> dict[str, Any]:
    """What a TOML file holds; nothing without one. CouldNotRun if it can't be read."""
    if path is None:
        return {}
    try:
        return tomllib.loads(read_text(path, str(path)))
    except (ValueError, RecursionError) as error:
        raise CouldNotRun(f"{path} is not TOML: {error}") from error


def to_toml(tables: Mapping[str, Any]) -> str:
    """TOML of dataclasses by their table's name, every setting written."""
    lines = []
    for stage, record in tables.items():
        lines.append(f"[{stage}]")
        lines += [f"{name} = {toml_value(x)}" for name, x in asdict(record).items()]
        lines.append("")
    return "\n".join(lines)


def toml_value(x: Any) -> str:
    """One line; a table's entries in the order of their names."""
    if isinstance(x, Mapping):
        entries = (f"{_key(key)} = {toml_value(x[key])}" for key in sorted(x))
        return "{ " + ", ".join(entries) + " }" if x else "{}"
    if isinstance(x, (list, tuple)):
        return "[" + ", ".join(map(toml_value, x)) + "]"
    # TOML's numbers, texts and booleans are JSON's, but for DEL, which must be escaped
    return json.dumps(x, ensure_ascii=False).replace("\x7f", "\\u007f")


def _table(stage: str, tables: Mapping[str, Any]) -> Mapping[str, Any]:
    """The stage's part of a file: all of it, unless it has tables of stages and of nothing else."""
    if not any(name in NAMES for name in tables):
        return tables
    for name, table in tables.items():
        if name not in NAMES or not isinstance(table, dict):
            raise CouldNotRun(
                f"a file of settings with a table per stage must hold nothing else, got {name}"
            )
    found: Mapping[str, Any] = tables.get(stage, {})
    return found


def _key(key: str) -> str:
    return key if BARE.fullmatch(key) else toml_value(key)


def _value(text: str) -> Any:
    """A value as TOML has it, or else the text."""
    try:
        found = tomllib.loads(f"x = {text}")
    except (ValueError, RecursionError):
        return text
    return found["x"] if len(found) == 1 else text


def _as(value: Any, hint: Any) -> Any:
    """TOML's lists as tuples, and its integers as floats where these are wanted."""
    if isinstance(value, list) and get_origin(hint) is tuple:
        return tuple(_as(x, get_args(hint)[0]) for x in value)
    if hint is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    return value


def _is(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is tuple:
        return isinstance(value, tuple) and all(_is(x, get_args(hint)[0]) for x in value)
    if origin is not None:
        return isinstance(value, Mapping)
    return type(value) is hint


def _check_plain(name: str, value: Any) -> None:
    """CouldNotRun unless TOML can say it, and all numbers are finite."""
    if isinstance(value, Mapping):
        for key, x in value.items():
            _check_plain(name, key)
            _check_plain(f"{name}.{key}", x)
    elif isinstance(value, (list, tuple)):
        for x in value:
            _check_plain(name, x)
    elif isinstance(value, float):
        expect_setting(isfinite(value), name, "be finite", value)
    elif isinstance(value, str):
        whole = not any("\ud800" <= x <= "\udfff" for x in value)
        expect_setting(whole, name, "be Unicode", value)
    else:
        expect_setting(type(value) in (int, bool), name, "be a number, text, list or table", value)

"""The part of JSON Schema that our schemas use, as a check."""

from __future__ import annotations

from typing import Any

TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}
KNOWN = {
    "$schema",
    "$defs",
    "$ref",
    "title",
    "description",
    "type",
    "enum",
    "const",
    "oneOf",
    "required",
    "properties",
    "additionalProperties",
    "items",
    "minimum",
    "pattern",
}


def misfits(x: Any, schema: dict[str, Any], root: dict[str, Any], place: str = "") -> list[str]:
    """What of ``x`` the schema does not allow, each with its place."""
    assert schema.keys() <= KNOWN, schema.keys() - KNOWN
    if "$ref" in schema:
        found = root
        for step in schema["$ref"].removeprefix("#/").split("/"):
            found = found[step]
        return misfits(x, found, root, place)
    wrong = []
    if "oneOf" in schema:
        fits = [not misfits(x, one, root, place) for one in schema["oneOf"]]
        wrong += [] if sum(fits) == 1 else [f"{place} fits {sum(fits)} of {len(fits)}"]
    if "const" in schema and x != schema["const"]:
        wrong.append(f"{place} is {x}")
    if "enum" in schema and x not in schema["enum"]:
        wrong.append(f"{place} is {x}")
    if "type" in schema:
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not any(
            isinstance(x, TYPES[kind]) and not (isinstance(x, bool) and kind != "boolean")
            for kind in kinds
        ):
            return [*wrong, f"{place} is a {type(x).__name__}"]
    if "minimum" in schema and x < schema["minimum"]:
        wrong.append(f"{place} is {x}")
    if isinstance(x, dict):
        wrong += [f"{place} lacks {name}" for name in schema.get("required", []) if name not in x]
        for name, value in x.items():
            inner = schema.get("properties", {}).get(name, schema.get("additionalProperties", {}))
            if inner is False:
                wrong.append(f"{place} has {name}")
            elif inner is not True:
                wrong += misfits(value, inner, root, f"{place}.{name}")
    if isinstance(x, list) and "items" in schema:
        for n, value in enumerate(x):
            wrong += misfits(value, schema["items"], root, f"{place}[{n}]")
    return wrong

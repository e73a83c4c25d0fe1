"""Random JSON schemas with short texts, and whether a text matches one."""

from __future__ import annotations

import random


def random_schema(source: random.Random, depth: int = 0) -> dict[str, object]:
    """A bounded schema: every text that matches it is short."""
    kind = source.choice(
        ["string", "integer", "boolean", "enum", *["object", "array"] * (depth < 2)]
    )
    if kind == "string":
        return {"type": "string", "maxLength": source.randint(0, 12)}
    if kind == "integer":
        return {"type": "integer", "minimum": -99, "maximum": source.randint(0, 9999)}
    if kind == "enum":
        return {"enum": source.sample(["red", "green", "blue", 1, 2.5, None, True], 3)}
    if kind == "array":
        items = random_schema(source, depth + 1)
        return {"type": "array", "items": items, "maxItems": source.randint(0, 3)}
    if kind == "object":
        names = source.sample("abcdef", source.randint(1, 3))
        return {
            "type": "object",
            "properties": {name: random_schema(source, depth + 1) for name in names},
            "required": names,
            "additionalProperties": False,
        }
    return {"type": "boolean"}


def valid(value: object, schema: dict[str, object]) -> bool:
    """Whether a value matches a schema of `random_schema`."""
    if "enum" in schema:
        return value in schema["enum"]  # type: ignore[operator]
    kind = schema["type"]
    if kind == "string":
        return isinstance(value, str) and len(value) <= schema["maxLength"]  # type: ignore[operator]
    if kind == "integer":
        return type(value) is int and -99 <= value <= schema["maximum"]  # type: ignore[operator]
    if kind == "boolean":
        return isinstance(value, bool)
    if kind == "array":
        few = isinstance(value, list) and len(value) <= schema["maxItems"]  # type: ignore[operator]
        return few and all(valid(item, schema["items"]) for item in value)  # type: ignore
    properties = schema["properties"]
    same = isinstance(value, dict) and set(value) == set(properties)  # type: ignore[call-overload]
    return same and all(valid(value[name], properties[name]) for name in properties)  # type: ignore

"""JSON schemas made to hurt, and honest ones that look like them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

LINKS: dict[str, Callable[[Schema], Schema]] = {
    "properties": lambda inner: {"type": "object", "properties": {"a": inner}},
    "items": lambda inner: {"type": "array", "items": inner},
    "prefixItems": lambda inner: {"type": "array", "prefixItems": [inner]},
    "additionalProperties": lambda inner: {"type": "object", "additionalProperties": inner},
    "allOf": lambda inner: {"allOf": [inner]},
    "anyOf": lambda inner: {"anyOf": [inner, {"type": "null"}]},
    "oneOf": lambda inner: {"oneOf": [inner]},
    "$ref": lambda inner: inner,
}
"""Ways for a schema to hold another."""


def chain(length: int, link: Callable[[Schema], Schema], *, ring: bool = False) -> Schema:
    """Definitions of which each holds a reference to the next; the last one's is to the first, or a string."""
    last = {"$ref": "#/$defs/d0"} if ring else {"type": "string"}
    following = [*({"$ref": f"#/$defs/d{number + 1}"} for number in range(length - 1)), last]
    return {
        "type": "object",
        "$ref": "#/$defs/d0",
        "$defs": {f"d{n}": link(inner) for n, inner in enumerate(following)},
    }


def nested(depth: int, link: Callable[[Schema], Schema]) -> Schema:
    """Schemas within schemas."""
    schema: Schema = {"type": "string"}
    for _ in range(depth):
        schema = link(schema)
    return {"type": "object", **schema}


def wide(count: int) -> Schema:
    """One object with many properties."""
    return {"type": "object", "properties": {f"p{number}": {} for number in range(count)}}


def _data(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def _tree(depth: int) -> Schema:
    """2 ** depth - 1 parts in as many levels as there are definitions: few levels, many properties in all."""
    if depth == 0:
        return {"type": "null"}
    return {"type": "object", "properties": {side: _tree(depth - 1) for side in ("left", "right")}}


HOSTILE: dict[str, Schema] = {
    **{f"a chain of {name}": chain(1000, link) for name, link in LINKS.items()},
    **{f"a ring of {name}": chain(1000, link, ring=True) for name, link in LINKS.items() if name != "$ref"},
    **{f"nested {name}": nested(120, link) for name, link in LINKS.items() if name != "$ref"},
    "a chain in additional keywords": {**chain(200, lambda inner: {"not": inner}), "type": "object"},
    "11,000 properties": wide(11_000),
    "1,001 properties": wide(1001),
    "many properties in many objects": _tree(10),
    "a long enum": {"type": "object", "properties": {"a": {"enum": [f"word {n}" for n in range(20_000)]}}},
    "many parts": {"type": "object", "const": [[]] * 20_000},
    "deep data": {"type": "object", "const": _data(300)},
    "an integer beyond 64 bits": {"type": "object", "properties": {"n": {"maximum": 2**64}}},
    "an integer of 4,000 digits": {"type": "object", "minProperties": 10**4000},
    "a reference with a number of 5,000 digits": {
        "type": "object",
        "$ref": "#/allOf/" + "9" * 5000,
        "allOf": [{}] * 70,
    },
    "options of the library": {"type": "object", "x-guidance": {"whitespace_flexible": False}},
    "options of the library within": {"type": "object", "properties": {"a": {"x-guidance": {"lenient": True}}}},
}
"""All are refused, whether as too large by our measure or by the library."""

LIST = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
}

HONEST: dict[str, Schema] = {
    "a list that refers to itself": LIST,
    "two that refer to each other": chain(2, LINKS["properties"], ring=True),
    "a chain of 60": chain(60, LINKS["properties"]),
    "nested 60 deep": nested(60, LINKS["properties"]),
    "1,000 properties": wide(1000),
    "a property called as the options": {"type": "object", "properties": {"x-guidance": {"type": "string"}}},
    "data that looks like the options": {"type": "object", "enum": [{"x-guidance": {}}]},
    "integers of 64 bits": {"type": "object", "properties": {"n": {"type": "integer", "maximum": 2**63 - 1}}},
}
"""All are served."""

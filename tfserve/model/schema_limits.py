"""What a JSON schema may ask of the grammar library, measured before that library sees it. Torch-free.

llguidance follows references by recursion, and the more properties there are, the longer it compiles. Nothing here
recurses.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from tfserve import strict_json
from tfserve.errors import RequestError
from tfserve.model.schema_ends import SchemaDocument

MAX_SCHEMA_CHARS = 131_072
"""Longest JSON schema, and longest grammar (OpenAI's limit for a schema is about as high)."""

MAX_LEVELS = 64
"""Most levels of schemas within schemas, where a reference leads to a level more."""

MAX_PROPERTIES = 1000
"""Most properties of one schema, over all its objects."""

MAX_PARTS = 10_000
"""Most objects and lists in one schema."""

_LIBRARY_KEY = "x-guidance"
"""Holds options of llguidance: separators, white space, leniency. They are the server's to set."""

_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""Keywords whose value maps names to schemas."""

_DATA = frozenset({"const", "enum", "default", "examples"})
"""Keywords whose value is data and no schema."""


class _Kind(enum.Enum):
    """What a part of a schema is; only a SCHEMA has keywords."""

    SCHEMA = enum.auto()
    MAP = enum.auto()
    DATA = enum.auto()


_Part = tuple[int, _Kind]
"""A part by its identity, and what it is taken for."""

_Edge = tuple[Any, _Kind, int]
"""A part within another part, or referred to by it; its kind, and how many levels deeper it is."""


def check_schema(schema: Mapping[str, Any], param: str) -> int:
    """How many bytes a schema has. Raises RequestError about the field `param` if it is too large or deep, or no JSON.

    Takes a tenth of a second for the largest that is allowed; of larger ones only the size is measured.
    """
    try:
        size = len(msgspec.json.encode(schema))
    except RecursionError:
        raise _refusal(param, _TOO_DEEP) from None
    except (TypeError, ValueError, OverflowError):  # what is no JSON; its place is looked for below
        size = 0
    if size > MAX_SCHEMA_CHARS:
        raise _refusal(param, f"there are {size} bytes, which is too long; the limit is {MAX_SCHEMA_CHARS}")
    try:
        _Survey(schema).check()
    except ValueError as error:
        raise _refusal(param, str(error)) from None
    # The library fails on integers beyond 64 bits, and rounds a const to a double.
    if problem := strict_json.unreadable(schema, exact=("const", "enum")):
        raise _refusal(param, f"{problem}; change or remove it")
    return size


_TOO_DEEP = f"schemas are nested, or refer to each other, more than {MAX_LEVELS} levels deep; make it flatter"


def _refusal(param: str, problem: str) -> RequestError:
    return RequestError(param, f"{param}: in this JSON schema {problem}", "invalid_grammar")


class _Survey:
    """One walk over a schema, depth first, along its references too."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._schema = schema
        self._document = SchemaDocument(schema)
        self._num_properties = 0

    def check(self) -> None:
        """Raise ValueError with what is wrong.

        The levels are those of the longest chain of parts. A reference back into the chain that is being followed ends
        it: a schema that refers to itself is as deep as what lies between.
        """
        heights: dict[_Part, int] = {}  # levels below each part; 0 while it is being followed
        path: list[tuple[_Part, int, Iterator[_Edge]]] = []
        best = [0]  # for the root's parent and each part of the path: levels known to be below it
        depth = 0
        edges = iter([(self._schema, _Kind.SCHEMA, 0)])
        while True:
            edge = next(edges, None)
            if edge is not None:
                value, kind, levels = edge
                part = id(value), kind
                if part in heights:
                    best[-1] = max(best[-1], levels + heights[part])
                else:
                    heights[part] = 0
                    if len(heights) > MAX_PARTS:
                        raise ValueError(f"there are more than {MAX_PARTS} objects and lists; simplify it")
                    path.append((part, levels, edges))
                    best.append(0)
                    depth += levels
                    edges = self._edges(value, kind)
            elif path:
                part, levels, edges = path.pop()
                heights[part] = best.pop()
                depth -= levels
                best[-1] = max(best[-1], levels + heights[part])
            else:
                return
            if depth + best[-1] > MAX_LEVELS:
                raise ValueError(_TOO_DEEP)

    def _edges(self, value: Any, kind: _Kind) -> Iterator[_Edge]:
        """The parts of a part, and what it refers to. Raises ValueError."""
        if not isinstance(value, Mapping):
            for each in value:
                if isinstance(each, _CONTAINERS):
                    yield each, kind, _step(each)
            return
        if kind is _Kind.SCHEMA:
            self._check_keywords(value)
            reference = value.get("$ref")
            if isinstance(reference, str) and isinstance(target := self._document.target(reference), _CONTAINERS):
                yield target, _Kind.SCHEMA, 1
        for key, each in value.items():
            if not isinstance(each, _CONTAINERS):
                continue
            if kind is _Kind.SCHEMA and key in _MAPS and isinstance(each, Mapping):
                yield each, _Kind.MAP, 0
            elif kind is _Kind.DATA or (kind is _Kind.SCHEMA and key in _DATA):
                yield each, _Kind.DATA, 1
            else:
                yield each, _Kind.SCHEMA, _step(each) if isinstance(each, Mapping) else 0

    def _check_keywords(self, schema: Mapping[str, Any]) -> None:
        if _LIBRARY_KEY in schema:
            raise ValueError(f"there is {_LIBRARY_KEY}, which is no keyword of JSON Schema; remove it")
        properties = schema.get("properties")
        self._num_properties += len(properties) if isinstance(properties, Mapping) else 0
        if self._num_properties > MAX_PROPERTIES:
            raise ValueError(f"there are more than {MAX_PROPERTIES} properties; leave some out")


_CONTAINERS = (dict, list, tuple)


def _step(part: Any) -> int:
    """How many levels deeper a part is than what holds it: what only refers to another is no level of its own."""
    is_reference = isinstance(part, Mapping) and "$ref" in part
    return 0 if is_reference and not any(isinstance(each, _CONTAINERS) for each in part.values()) else 1

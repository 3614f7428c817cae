"""Size limits of JSON schemas, checked before the grammar library reads one. Torch-free.

llguidance follows references by recursion, and its compile time grows with the properties. Nothing here is recursive.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from tfserve import strict_json
from tfserve.errors import RequestError
from tfserve.model.grammars.schema_ends import SchemaDocument

MAX_SCHEMA_CHARS = 131_072
"""Longest JSON schema, and longest grammar (OpenAI's limit for a schema is similar)."""

MAX_LEVELS = 64
"""Most nested levels of schemas; a reference counts as a level."""

MAX_PROPERTIES = 1000
"""Most properties of one schema, over all its objects."""

MAX_PARTS = 10_000
"""Most objects and lists in one schema."""

_LIBRARY_KEY = "x-guidance"
"""Key of llguidance's options: separators, white space, leniency. Only the server sets them."""

_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""Keywords whose value maps names to schemas."""

_DATA = frozenset({"const", "enum", "default", "examples"})
"""Keywords whose value is data, not a schema."""


class _Kind(enum.Enum):
    """Kinds of parts of a schema; only a SCHEMA has keywords."""

    SCHEMA = enum.auto()
    MAP = enum.auto()
    DATA = enum.auto()


_Part = tuple[int, _Kind]
"""A part by its identity, and its kind."""

_Edge = tuple[Any, _Kind, int]
"""A part within another part, or referenced by it; its kind, and its additional levels."""


def check_schema(schema: Mapping[str, Any], param: str) -> int:
    """The size of a schema in bytes. Raises RequestError about `param` if it is too large, too deep, or not JSON.

    Takes a tenth of a second for the largest allowed schema; for a larger one only the size is measured.
    """
    try:
        size = len(msgspec.json.encode(schema))
    except RecursionError:
        raise _refusal(param, _TOO_DEEP) from None
    except (TypeError, ValueError, OverflowError):  # not JSON; the place is searched for below
        size = 0
    if size > MAX_SCHEMA_CHARS:
        raise _refusal(param, f"there are {size} bytes, which is too long; the limit is {MAX_SCHEMA_CHARS}")
    try:
        _Survey(schema).check()
    except ValueError as error:
        raise _refusal(param, str(error)) from None
    # llguidance fails on integers beyond 64 bits, and rounds a const to a double.
    if problem := strict_json.unreadable(schema, exact=("const", "enum")):
        raise _refusal(param, f"{problem}; change or remove it")
    return size


_TOO_DEEP = f"schemas are nested, or refer to each other, more than {MAX_LEVELS} levels deep; make it flatter"


def _refusal(param: str, problem: str) -> RequestError:
    return RequestError(param, f"{param}: in this JSON schema {problem}", "invalid_grammar")


class _Survey:
    """A depth-first walk over a schema that follows references."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._schema = schema
        self._document = SchemaDocument(schema)
        self._num_properties = 0

    def check(self) -> None:
        """Raise ValueError with what is wrong.

        The number of levels is that of the longest chain of parts. A reference back into the current chain ends it: it
        adds no levels.
        """
        heights: dict[_Part, int] = {}  # levels below each part; 0 while it is on the path
        path: list[tuple[_Part, int, Iterator[_Edge]]] = []
        best = [0]  # for the root's parent and each part of the path: levels found below it so far
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
        """The parts within a part, and those it references. Raises ValueError."""
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
    """Levels between a part and its parent: a schema that is only a reference is not a level."""
    is_reference = isinstance(part, Mapping) and "$ref" in part
    return 0 if is_reference and not any(isinstance(each, _CONTAINERS) for each in part.values()) else 1

"""What a body holds against what its Struct says: fields too many, lists too long, whole numbers written as 4.0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from msgspec import inspect

from tfserve.errors import RequestError
from tfserve.http.known_fields import NESTED_FIELDS, Fields, Unsupported

Fix = Callable[[Any, str], Any]
"""Makes a value, found at a path, what msgspec takes for it; leaves alone what is of another type."""

_MAY_NEED_FIX = frozenset({float, list, dict})

_LOOKED_AT_ONCE = 65_536
"""Items of a list that one call looks at, which keeps the interpreter lock: a prompt may be millions of token ids."""


def body_fix(struct: type[msgspec.Struct], fields: Fields, on_unknown: Callable[[str], None]) -> Fix:
    """The Fix of a whole body, which may have `fields` beside those of `struct`.

    `on_unknown` gets the name of each field that no table has; one of a Struct that forbids them is refused.
    The Fix raises RequestError for fields that are refused.
    """
    maker = _Maker({**NESTED_FIELDS, struct: fields}, on_unknown)
    fix = maker.fix_of(inspect.type_info(struct))
    assert fix is not None
    return fix


class _Maker:
    """Makes Fixes of types. There is none for a type that can hold neither an object nor an integer, at any length."""

    def __init__(self, tables: Mapping[type, Fields], on_unknown: Callable[[str], None]) -> None:
        self._tables = tables
        self._on_unknown = on_unknown

    def fix_of(self, kind: inspect.Type) -> Fix | None:
        if isinstance(kind, inspect.Metadata):
            return self.fix_of(kind.type)
        fix = self._fix_of_parts(kind)
        match kind:
            case inspect.StrType(max_length=int(most)):
                return _bounded(str, most, fix)
            case inspect.ListType(max_length=int(most)):
                return _bounded(list, most, fix)
            case inspect.DictType(max_length=int(most)):
                return _bounded(dict, most, fix)
        return fix

    def _fix_of_parts(self, kind: inspect.Type) -> Fix | None:
        match kind:
            case inspect.IntType():
                return _whole
            case inspect.ListType():
                return self._list_fix(kind)
            case inspect.StructType():
                return self._struct_fix(kind)
            case inspect.UnionType():
                return self._union_fix(kind)
        return None

    def _list_fix(self, kind: inspect.ListType) -> Fix | None:
        fix = self.fix_of(kind.item_type)
        if fix is None:
            return None
        named = _holds_structs(kind.item_type)

        def fix_list(value: Any, path: str) -> Any:
            if not isinstance(value, list) or not _may_need_fix(value):
                return value
            return [fix(item, f"{path}[{number}]" if named else path) for number, item in enumerate(value)]

        return fix_list

    def _union_fix(self, kind: inspect.UnionType) -> Fix | None:
        types = [member.type if isinstance(member, inspect.Metadata) else member for member in kind.types]
        has_float = any(isinstance(member, inspect.FloatType) for member in types)
        members = [member for member in types if not (has_float and isinstance(member, inspect.IntType))]
        fixes = [fix for member in members if (fix := self.fix_of(member)) is not None]
        if not fixes:
            return None

        def fix_union(value: Any, path: str) -> Any:
            for fix in fixes:
                value = fix(value, path)
            return value

        return fix_union

    def _struct_fix(self, kind: inspect.StructType) -> Fix:
        names = frozenset(field.encode_name for field in kind.fields)
        fixes = {field.encode_name: fix for field in kind.fields if (fix := self.fix_of(field.type)) is not None}
        table = self._tables.get(kind.cls, {})

        def fix_struct(value: Any, path: str) -> Any:
            if not isinstance(value, dict):
                return value
            before = f"{path}." if path else ""
            for name in value.keys() - names:
                self._check(before + name, table.get(name), value[name], kind)
            for name in fixes.keys() & value.keys():
                value[name] = fixes[name](value[name], before + name)
            return value

        return fix_struct

    def _check(self, name: str, known: object, value: Any, kind: inspect.StructType) -> None:
        """A field that the Struct of type `kind` has not. Raises RequestError if it may not be there."""
        if isinstance(known, Unsupported):
            if known.asks(value):
                raise RequestError(name, _refusal(name, known), "unsupported_parameter")
        elif known is None and kind.forbid_unknown_fields:
            fields = ", ".join(field.encode_name for field in kind.fields)
            raise RequestError(name, f"{name} is not a field of this request; it may have: {fields}")
        elif known is None:
            self._on_unknown(name)


def _holds_structs(kind: inspect.Type) -> bool:
    """True if there may be objects, whose errors name their places."""
    if isinstance(kind, inspect.UnionType):
        return any(map(_holds_structs, kind.types))
    return isinstance(kind, inspect.StructType) or (
        isinstance(kind, inspect.ListType) and _holds_structs(kind.item_type)
    )


def _bounded(kind: type[str | list[Any] | dict[str, Any]], most: int, fix: Fix | None) -> Fix:
    """Refuses a value of this kind that is longer, before `fix` loops over it."""
    parts = "characters" if kind is str else "entries"

    def check(value: Any, path: str) -> Any:
        if isinstance(value, kind) and len(value) > most:
            raise RequestError(path, f"{path} must have at most {most} {parts}, got {len(value)}")
        return value if fix is None else fix(value, path)

    return check


def _may_need_fix(items: list[Any]) -> bool:
    begins = range(0, len(items), _LOOKED_AT_ONCE)
    return any(not _MAY_NEED_FIX.isdisjoint(map(type, items[begin : begin + _LOOKED_AT_ONCE])) for begin in begins)


def _whole(value: Any, _path: str) -> Any:
    """JSON has one kind of number: 4.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _refusal(name: str, known: Unsupported) -> str:
    values = [msgspec.json.encode(value).decode() for value in known.harmless]
    wish = f"remove it or send {' or '.join(values)}" if values else "remove it"
    advice = f"{known.instead}, or {wish}" if known.instead else wish
    return f"{name}: this value is not supported by this server; {advice}"

"""Finds and describes the place where data does not fit a type.

msgspec decodes and refuses. Its message is not used, because its wording changes between releases. The search here runs
only after a refusal; it takes about as long as decoding again.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec

_KINDS: Mapping[object, str] = {
    type(None): "null",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    tuple: "a list",
    Sequence: "a list",
    dict: "an object",
    Mapping: "an object",
}

_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "pattern": "that matches", "max_length": "of length <="}

_SHOWN_CHARS = 60


@dataclass(frozen=True, slots=True)
class Misfit:
    """One value that does not fit. `rule` follows the path in the message: "must be an integer".

    `path` is as in "messages[0].role", and empty for the whole. `value` is UNSET if it is missing. `right_kind` is true
    for an integer out of bounds or an unknown name: then the message shows the value itself, not its type. `hint`
    follows the value; it suggests a name similar to an unknown one.
    """

    path: str
    rule: str
    value: object = msgspec.UNSET
    right_kind: bool = False
    hint: str = ""

    def __str__(self) -> str:
        """The whole message: the path, the rule, and what was found."""
        shown = f"{self.value!r:.{_SHOWN_CHARS}}" if self.right_kind else _word(type(self.value))
        got = "" if self.value is msgspec.UNSET else f", got {shown}"
        return f"{self.path} {self.rule}{got}{self.hint}".lstrip()


def find_misfit(value: object, expected: Any, *, strict: bool = True) -> Misfit | None:
    """The first part of plain data that does not fit the type `expected`; None if all of it does.

    Without `strict`, a string may stand for a number (see `msgspec.convert`).
    """
    return _Search(strict).look(value, expected, "")


def nearest(word: object, known: Iterable[object]) -> str | None:
    """The name in `known` that is most similar to `word`: one that ends in it, or is spelt alike."""
    import difflib

    if not isinstance(word, str) or len(word) > _SHOWN_CHARS:  # comparison is slow, clients choose the words
        return None
    names = [name for name in known if isinstance(name, str)]
    by_end = [name for name in names if name.endswith(f".{word}")]
    return next(iter(by_end or difflib.get_close_matches(word, names, n=1)), None)


class NotJsonError(ValueError):
    """Bytes that are not JSON, or too deep; the message follows the name of their container."""


def plain_json(data: bytes) -> Any:
    """The value of JSON bytes, as dicts and lists. Raises NotJsonError."""
    try:
        return msgspec.json.decode(data.decode())
    except UnicodeDecodeError:
        raise NotJsonError("is not valid UTF-8") from None
    except RecursionError:
        raise NotJsonError("is nested too deeply") from None
    except msgspec.ValidationError:
        raise NotJsonError("holds a number that is out of range") from None
    except msgspec.DecodeError as error:
        raise NotJsonError(f"is not valid JSON ({error})") from None


def why_not_json(data: bytes, expected: Any) -> str:
    """What is wrong with bytes that should be JSON of the type `expected`: "summary must be an object, got a list"."""
    try:
        misfit = find_misfit(plain_json(data), expected)
    except NotJsonError as error:
        return f"it {error}"
    if misfit is None:
        return "it does not fit"
    return str(misfit) if misfit.path else f"it {misfit}"


class _Search:
    """Walks through a type and data in parallel, to the first part that msgspec refuses by itself."""

    def __init__(self, strict: bool) -> None:
        self._strict = strict

    def look(self, value: object, expected: Any, path: str) -> Misfit | None:
        """The first misfit within `value`, which is at `path`."""
        if self._fits(value, expected):
            return None
        of_value = get_origin(expected) in (Annotated, Literal)
        near = nearest(value, get_args(expected)) if get_origin(expected) is Literal else None
        hint = f"; did you mean {near!r}?" if near else ""
        return self._inside(value, expected, path) or Misfit(path, f"must be {_word(expected)}", value, of_value, hint)

    def _inside(self, value: object, expected: Any, path: str) -> Misfit | None:
        """A misfit in a part of `value`, or in its type, before bounds and choices are checked."""
        origin, args = get_origin(expected) or expected, get_args(expected)
        if origin is Annotated:
            return self.look(value, args[0], path)
        if origin in (Union, types.UnionType):
            return self._look_in_union(value, args, path)
        if _is_struct(origin) and isinstance(value, Mapping):
            return self._look_in_struct(value, origin, path)
        if _KINDS.get(origin) == "an object" and isinstance(value, Mapping) and args:
            return self._look_in_dict(value, expected, path)
        if _KINDS.get(origin) == "a list" and isinstance(value, list | tuple) and args:
            number = _first(value, lambda part: self._fits(part, list[args[0]]))  # type: ignore[valid-type]
            return self.look(value[number], args[0], f"{path}[{number}]")
        return None

    def _fits(self, value: object, expected: Any) -> bool:
        try:
            msgspec.convert(value, expected, strict=self._strict, str_keys=True)
        except msgspec.ValidationError:
            return False
        return True

    def _look_in_struct(self, value: Mapping[Any, Any], struct: type[msgspec.Struct], path: str) -> Misfit | None:
        inside = f"{path}." if path else ""
        if (tag := struct.__struct_config__.tag_field) and tag not in value:
            return Misfit(f"{inside}{tag}", "is required")
        if tag and value[tag] != struct.__struct_config__.tag:
            return Misfit(f"{inside}{tag}", f"must be {struct.__struct_config__.tag!r}", value[tag], True)
        for field in msgspec.structs.fields(struct):
            name = field.encode_name
            if name in value:
                if misfit := self.look(value[name], field.type, f"{inside}{name}"):
                    return misfit
            elif field.required:
                return Misfit(f"{inside}{name}", "is required")
        known = {field.encode_name for field in msgspec.structs.fields(struct)}
        if struct.__struct_config__.forbid_unknown_fields and not known.issuperset(value):
            return Misfit(path, f"has a field that it cannot have; known: {', '.join(sorted(known))}", right_kind=True)
        return None

    def _look_in_dict(self, value: Mapping[Any, Any], expected: Any, path: str) -> Misfit | None:
        items = list(value.items())
        key, item = items[_first(items, lambda part: self._fits(dict(part), expected))]
        of_key, of_item = get_args(expected)
        if self._fits({key: None}, dict[of_key, Any]):  # type: ignore[valid-type]
            return self.look(item, of_item, f"{path}[{key!r:.{_SHOWN_CHARS}}]")
        return Misfit(path, f"must have keys that are each {_word(of_key)}", key, True)

    def _look_in_union(self, value: object, branches: Sequence[Any], path: str) -> Misfit | None:
        """A misfit within the branch of a union that matches the type of `value`, if there is one."""
        if isinstance(value, Mapping) and (tagged := [branch for branch in branches if _has_tag(branch, value)]):
            branches = tagged
        misfits = [misfit for branch in branches if (misfit := self.look(value, branch, path))]
        return _joined([each for each in misfits if each.path != path or each.right_kind] or misfits)


def _joined(misfits: Sequence[Misfit]) -> Misfit:
    """Merge the misfits at the path of the first one into one."""
    rules = dict.fromkeys(each.rule for each in misfits if each.path == misfits[0].path)
    if len(rules) == 1:
        return misfits[0]
    return replace(misfits[0], rule=f"must be {_either(rule.removeprefix('must be ') for rule in rules)}")


def _first(parts: Sequence[Any], fits: Callable[[Sequence[Any]], bool]) -> int:
    """Index of the first part that does not fit; there must be one. Takes the time of one pass over all parts."""
    low, high = 0, len(parts)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(parts[low:middle]) else (low, middle)
    return low


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _has_tag(kind: Any, value: Mapping[Any, Any]) -> bool:
    config = kind.__struct_config__ if _is_struct(kind) else None
    return config is not None and bool(config.tag_field) and value.get(config.tag_field) == config.tag


def _word(kind: Any) -> str:
    """The name of a type in JSON."""
    origin, args = get_origin(kind) or kind, get_args(kind)
    if origin is Annotated:
        rules = [
            f"{word} {value}"
            for name, word in _BOUNDS.items()
            for meta in args[1:]
            if (value := getattr(meta, name, None)) is not None
        ]
        return " ".join([_word(args[0]), " and ".join(rules)]).rstrip()
    if origin is Literal:
        return _either([repr(each) for each in args])
    if origin in (Union, types.UnionType):
        return _either(dict.fromkeys(map(_word, args)))
    return "an object" if _is_struct(origin) else _KINDS.get(origin, getattr(origin, "__name__", str(origin)))


def _either(words: Iterable[str]) -> str:
    *most, last = [word for word in words if word not in ("null", "UnsetType")] or ["null"]
    return f"{', '.join(most)} or {last}" if most else last

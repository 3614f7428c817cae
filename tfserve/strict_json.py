"""Strict JSON: refuses or repairs what Python's `json` accepts and other readers cannot parse.

Python accepts NaN, Infinity and numbers beyond a double, which are not JSON, and half of a surrogate pair in a string,
which is not UTF-8. Here a number that is not finite is an error, read or written. Half a pair from an escape
(`\\ud83d`) becomes U+FFFD, as undecodable bytes do.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, AnyStr, NoReturn

_ESCAPE = r"\\(?:(u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)"
"""An escape in JSON: a pair of surrogates (group 1), one alone (group 2), or any other."""

_TEXT_ESCAPE = re.compile(_ESCAPE, re.DOTALL)
_BYTES_ESCAPE = re.compile(_ESCAPE.encode(), re.DOTALL)
_HALF = re.compile(r"[\ud800-\udfff]")


def mend(text: AnyStr) -> AnyStr:
    """JSON text with U+FFFD in place of each escape of half a surrogate pair; usually `text` itself."""
    if isinstance(text, bytes):
        if b"\\ud" not in text and b"\\uD" not in text:
            return text
        return _BYTES_ESCAPE.sub(lambda found: b"\\ufffd" if found[2] else found[0], text)
    if "\\ud" not in text and "\\uD" not in text:
        return text
    return _TEXT_ESCAPE.sub(lambda found: "\\ufffd" if found[2] else found[0], text)


def loads(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for invalid JSON, and for values nested too deeply."""
    text = mend(text).strip(_SPACE)
    value, end = decode_at(text, 0)
    if end < len(text):
        raise ValueError(f"{text[end : end + 20]!r} after the end of the JSON")
    return value


def decode_at(text: str, place: int) -> tuple[Any, int]:
    """The JSON value that begins at `place` of a repaired text, and its end. Raises ValueError as `loads` does."""
    try:
        return _DECODER.raw_decode(text, place)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def dumps(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The JSON text of a value. Raises ValueError for a number that is not finite and for values nested too deeply."""
    layout: dict[str, Any] = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
    try:
        return json.dumps(value, ensure_ascii=ensure_ascii, allow_nan=False, **layout)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def is_text(text: str) -> bool:
    """False for text with half a surrogate pair: encoders and tokenizers refuse it."""
    return _HALF.search(text) is None


def well_formed(text: str) -> str:
    """`text` with U+FFFD for each half of a surrogate pair."""
    return _HALF.sub("\N{REPLACEMENT CHARACTER}", text)


def deepest(value: Any) -> str | None:
    """The key with the most deeply nested value; None if `value` is not an object, or is empty."""
    name = None
    level = [(key, each) for key, each in value.items()] if isinstance(value, Mapping) else []
    while level:
        name = level[0][0]
        inner: list[tuple[str, Any]] = []
        for key, each in level:
            parts = each.values() if isinstance(each, Mapping) else each if isinstance(each, list) else ()
            inner += ((key, part) for part in parts)
        level = inner
    return name


_Place = tuple["_Place", str] | None
"""The place of a value: the place of its container, and the key or index in it. None: the whole.

Not text: below a long key, the text of each place would repeat that key.
"""


def _path(place: _Place) -> str:
    steps = []
    while place is not None:
        place, step = place
        steps.append(step)
    return "".join(["$", *reversed(steps)])


def unreadable(value: Any, exact: Collection[str] = ()) -> str | None:
    """A part of `value` that many JSON readers cannot parse, with its place as `$.properties.id.maximum`; None if none.

    That is: integers beyond 64 bits (below a key of `exact`: beyond 53, where doubles have gaps), numbers that are not
    finite, text that is not valid Unicode, and Python values that are not JSON.
    """
    left: list[tuple[_Place, Any, int]] = [(None, value, 64)]
    while left:
        place, item, bits = left.pop()
        match item:
            case None | bool():
                pass
            case int() if (bits == 64 and -(2**63) <= item < 2**64) or abs(item) <= 2**53:
                pass
            case int():
                return f"{_path(place)} is an integer beyond {bits} bits"
            case float() if math.isfinite(item):
                pass
            case float():
                return f"{_path(place)} is not a finite number"
            case str() if is_text(item):
                pass
            case str():
                return f"{_path(place)} is not valid Unicode text"
            case Mapping() if all(isinstance(key, str) and is_text(key) for key in item):
                left += (((place, f".{key}"), each, 53 if key in exact else bits) for key, each in item.items())
            case list() | tuple():
                left += (((place, f"[{number}]"), each, bits) for number, each in enumerate(item))
            case _:
                return f"{_path(place)} is no JSON value"
    return None


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:20]} is too large")
    return value


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


_SPACE = " \t\n\r"
_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse)

"""Converts prompts of callers to text or lists of token ids. Torch-free: tensors are recognised by their methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from numbers import Number
from typing import Any

from tfserve.checked import to_integer, to_number
from tfserve.errors import RequestError

Prompt = str | Sequence[int]

_NO_PROMPTS = (bytes, bytearray, memoryview, Mapping, AbstractSet)
"""Iterable types that cannot be meant as prompts: iterating them would give something else."""

_PLAIN = (str, int, list, tuple, *_NO_PROMPTS)


def as_batch(prompts: Any) -> list[Prompt]:
    """A list of prompts from one prompt or several.

    Takes text, token ids, and any iterable of them; ids may be integers, arrays or tensors of any library. Raises
    RequestError about `prompts` for anything else. Does not check that ids are in the vocabulary.
    """
    items = _items(prompts, "prompts", "text, token ids, or a list of such prompts")
    if isinstance(items, str):
        return [items]
    if items and isinstance(items[0], Number):
        return [items]
    return [as_prompt(item, f"prompts[{index}]") for index, item in enumerate(items)]


def as_prompt(prompt: Any, name: str = "prompt") -> Prompt:
    """Text as it is, token ids as a list. Raises RequestError about the argument `name` for anything else."""
    return _items(prompt, name, "text or token ids")


def _items(value: Any, name: str, wanted: str) -> str | list[Any]:
    """Text unchanged, anything else as a list of Python numbers."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and set(map(type, value)) == {int}:
        return value.copy()
    plain = None if isinstance(value, _NO_PROMPTS) else _plain(value)
    if isinstance(plain, str):
        return plain
    if not isinstance(plain, Iterable):
        raise RequestError(name.partition("[")[0], f"{name} must be {wanted}, got {type(value).__name__}")
    return [_plain(item) for item in plain]


def _plain(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        # A subclass of int cannot be encoded in a message to another process.
        return value if to_integer(value) is None else to_integer(value)
    try:
        return to_number(value)
    except TypeError:
        return None if hasattr(value, "tolist") else value

"""Checked: a Struct that checks its fields when Python constructs it. msgspec itself checks only what it decodes."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import operator
import os
from dataclasses import replace
from functools import cache
from typing import Any

import msgspec

from tfserve.misfit import Misfit, find_misfit

_LEFT_ALONE = (bytes, bytearray, memoryview, datetime.date, datetime.time, datetime.timedelta, decimal.Decimal)
"""Types that msgspec would convert to text. No field accepts them."""


class Checked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of Structs that users construct in Python: every field has its declared type, or the constructor raises.

    Numbers and arrays of numpy or torch become Python numbers and lists, a mapping becomes the Struct of the field, a
    list a tuple, a Path text. Text is not converted to a number. `mistake` makes the error that is raised.
    """

    def __post_init__(self) -> None:
        """Raise what `mistake` returns for the first field whose value is of another type."""
        for name, kind, default in _fields(type(self)):
            value = getattr(self, name)
            if value is default:
                continue
            try:
                checked = msgspec.convert(value, kind)
            except msgspec.ValidationError:
                checked = self._read(name, value, kind)
            if checked is not value:
                msgspec.structs.force_setattr(self, name, checked)

    def _read(self, name: str, value: Any, kind: Any) -> Any:
        """The value converted to a type that msgspec knows, where possible."""
        if isinstance(value, msgspec.Struct):
            raise self.mistake(name, f"cannot be a {type(value).__name__}")
        with contextlib.suppress(TypeError):  # not data, for example a function
            value = msgspec.to_builtins(value, builtin_types=_LEFT_ALONE, enc_hook=_plain)
        try:
            return msgspec.convert(value, kind, str_keys=True)
        except msgspec.ValidationError:
            misfit = find_misfit(value, kind) or Misfit("", "has a value of the wrong type")
            dot = "." if misfit.path and not misfit.path.startswith("[") else ""
            raise self.mistake(name + dot + misfit.path, str(replace(misfit, path=""))) from None

    def mistake(self, key: str, message: str) -> Exception:
        """The error about a field; `key` is its name, and where in its value the mistake is."""
        raise NotImplementedError


def to_number(value: Any) -> Any:
    """A number of another library as a Python number; arrays and tensors as lists. Raises TypeError."""
    to_list = getattr(value, "tolist", None)
    if not callable(to_list):
        return operator.index(value)
    try:
        return to_list()
    except (RuntimeError, ValueError) as error:  # a tensor without storage, or a sparse one
        raise TypeError(f"a {type(value).__name__} whose numbers cannot be read") from error


def to_integer(value: Any) -> int | None:
    """An integer of any library as an `int`; None for anything else, also for True and False."""
    if isinstance(value, bool):
        return None
    with contextlib.suppress(TypeError):
        number = to_number(value)
        return number if type(number) is int else None
    return None


@cache
def _fields(struct: type[msgspec.Struct]) -> tuple[tuple[str, Any, Any], ...]:
    """Name, type and default of every field."""
    return tuple((field.name, field.type, field.default) for field in msgspec.structs.fields(struct))


def _plain(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else to_number(value)

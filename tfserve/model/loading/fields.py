"""Checked access to the files of a checkpoint: every error names file and key. Torch-free."""

from __future__ import annotations

import json
import logging
import reprlib
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tfserve.errors import ModelError, TfserveError, failures

logger = logging.getLogger(__name__)

_MAX_BYTES = 8 * 2**20
"""Largest JSON file or chat template that is read. Python objects may take fifty times as much memory."""

_MAX = 2**31 - 1
"""Largest size that a checkpoint may name."""

_FINITE = 3e38
"""Numbers below this are finite in float32."""


class Fields:
    """An object in a checkpoint's file; each getter checks the type of its value.

    null counts as absent. Getters raise ModelError, one line with file and key, for a value of another type, and for an
    absent value without a default.
    """

    def __init__(self, values: Mapping[str, Any], source: Path, parent: str = "") -> None:
        """`parent` leads to an object within the file: "rope_scaling." for example."""
        self._values, self.source, self._parent = values, source, parent

    def __contains__(self, key: object) -> bool:
        return key in self._values and self._values[str(key)] is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def error(self, message: str) -> ModelError:
        """The error about this object; `message` begins with the key."""
        return ModelError(f"{self.source}: {one_line(self._parent + message)}")

    def wrong(self, key: str, meaning: str) -> ModelError:
        """The error about a value of the wrong type or out of bounds."""
        return self.error(f"{key} must be {meaning}, got {shown(self.value(key))}")

    def value(self, key: str) -> Any:
        """The value of any type; None if absent."""
        return self._values.get(key)

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = _MAX) -> int:
        """An integer in [least, most]; 2.0 and true are not integers. The default is checked too."""
        value = self._required(key, default)
        if not is_integer(value, least, most):
            if least == 1 and not is_integer(value, 1, _MAX):
                raise self.error(f"{key} must be a positive integer, got {shown(value)}")
            raise self.error(f"{key} must be an integer in [{least}, {most}], got {shown(value)}")
        return int(value)

    def integers(self, key: str) -> list[int]:
        """A list of integers."""
        value = self._required(key, None)
        if not isinstance(value, list) or not all(is_integer(item, -_MAX, _MAX) for item in value):
            raise self.wrong(key, "a list of integers")
        return value

    def token_ids(self, key: str, vocab_size: int) -> list[int]:
        """One token id of a vocabulary of `vocab_size`, or a list of them; empty if absent."""
        value = self.value(key)
        items = value if isinstance(value, list) else [] if value is None else [value]
        for item in items:
            if not is_integer(item, 0, vocab_size - 1):
                found = shown(item) if items is not value else f"{shown(item)} in {shown(value)}"
                raise self.error(f"{key} must be ids of the vocabulary, integers in [0, {vocab_size}), got {found}")
        return items

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _FINITE:
            raise self.error(f"{key} must be a positive number, got {shown(value)}")
        return float(value)

    def flag(self, key: str) -> bool:
        """true or false; false if absent."""
        value = self.value(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return bool(value)

    def text(self, key: str, default: str | None = None) -> str:
        """Valid Unicode text."""
        value = self._required(key, default)
        if not is_text(value):
            raise self.error(f"{key} must be text, got {shown(value)}")
        return str(value)

    def texts(self, key: str, default: list[str] | None = None) -> list[str]:
        """A list of texts."""
        value = self._required(key, default)
        if not isinstance(value, list) or not all(map(is_text, value)):
            raise self.wrong(key, "a list of texts")
        return value

    def section(self, key: str) -> Fields:
        """The object under `key`; an empty one if absent."""
        value = self.value(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.wrong(key, "an object")
        return Fields(value or {}, self.source, f"{self._parent}{key}.")

    def _required(self, key: str, default: Any) -> Any:
        value = self.value(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(f"{key} is missing")
        return value


def read_fields(path: Path, *, optional: bool = False) -> Fields:
    """The JSON object in the file `path`; with `optional`, an empty one if there is no such file.

    Raises ModelError for a file that cannot be read or is not a JSON object.
    """
    if optional and is_absent(path):
        return Fields({}, path)
    try:
        values = json.loads(read_text(path))
    except RecursionError:
        raise ModelError(f"{path} is not valid JSON (nested too deep); download it again") from None
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({one_line(error)}); download it again") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path} must hold a JSON object, got {shown(values)}; download it again")
    return Fields(values, path)


def read_text(path: Path) -> str:
    """The text in the file `path`. Raises ModelError if it cannot be read, is too large or is not UTF-8."""
    require_file(path, _MAX_BYTES)
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is not UTF-8 text ({error}); download it again") from None


def require_file(path: Path, max_bytes: int) -> None:
    """Raise ModelError unless `path` is a file, or a link to one, of at most `max_bytes`.

    Reading a pipe, a socket or a device could block or never end.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise ModelError(f"{path} is not a regular file; download it again")
    if found.st_size > max_bytes:
        raise ModelError(
            f"{path} has {found.st_size} bytes; a file of this name has at most {max_bytes}: download it again"
        )


@contextmanager
def loading(path: Path) -> Iterator[None]:
    """Wraps everything that reads a model in `path`: any other exception becomes a ModelError."""
    try:
        yield
    except TfserveError:
        raise
    except failures() as error:
        logger.debug("%s cannot be loaded", path, exc_info=True)
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        raise ModelError(
            f"{path} cannot be loaded ({kind}{one_line(error)}); it may be damaged: download it again"
        ) from error


def is_absent(path: Path) -> bool:
    """True if there is nothing of that name. A broken link is not absent: an incomplete download has such links."""
    return not path.exists() and not path.is_symlink()


def is_integer(value: object, least: int, most: int) -> bool:
    """True for an integer in [least, most]; JSON's true and 2.0 are not integers."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_text(value: object) -> bool:
    """True for a string without half a surrogate pair, which no tokenizer accepts."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: object) -> str:
    """A value for a message: one line, cut short."""
    return reprlib.repr(value)


def one_line(said: BaseException | str) -> str:
    """Text from outside, such as another library's exception: one printable line, cut short."""
    text = " ".join(str(said).encode(errors="backslashreplace").decode().split()) or type(said).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."

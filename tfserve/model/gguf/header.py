"""Checks the header of a GGUF file before the `gguf` package reads it.

That package trusts every count and length in the file. Here they are checked against the file's size and against fixed
limits. Torch-free. Source: docs/gguf.md of ggml.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from tfserve.errors import ModelError
from tfserve.model.loading.fields import one_line, shown

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
"""struct's letters for the types of metadata values."""

_STRING, _ARRAY = 8, 9

_MAX_ENTRIES = 65_536
"""Most keys, and most tensors, in a file."""

_MAX_ITEMS = 2_000_000
"""Most items of all arrays together: a vocabulary of 500,000 tokens has about 1.5 million."""

_MAX_TEXT_BYTES = 2**24
_MAX_HEADER_BYTES = 2**28
_MAX_DIMS = 4
_DEFAULT_ALIGNMENT = 32

QuantSizes = Mapping[int, tuple[int, int]]
"""For each storage type of tensors: elements and bytes of a block."""


def check_header(path: Path, sizes: QuantSizes) -> None:
    """Raise ModelError, naming file and key, for a header that is invalid, inconsistent, or beyond the limits."""
    with path.open("rb") as file:
        _Header(path, file, path.stat().st_size).check(sizes)


class _Header:
    """Reads a header from start to end."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self._size = path, file, size
        self._order = "<"
        self._num_items = 0
        self._alignment = _DEFAULT_ALIGNMENT

    def check(self, sizes: QuantSizes) -> None:
        if self._read(4, "its first bytes") != b"GGUF":
            raise ModelError(
                f"{self._path} is not a whole GGUF file (it does not begin with 'GGUF'); download it again"
            )
        if self._number("I", "version") & 0xFFFF == 0:
            self._order = ">"  # the bytes of the number are in the other order
        num_tensors, num_keys = (self._count(name, _MAX_ENTRIES) for name in ("tensor_count", "metadata_kv_count"))
        for number in range(num_keys):
            key = self._text(f"key {number}")
            kind = self._number("I", key)
            value = self._value(kind, key)
            if key == "general.alignment" and isinstance(value, int):
                self._alignment = value
        if self._alignment < 1 or self._alignment & (self._alignment - 1):
            raise self._wrong("general.alignment", f"must be a power of two, got {self._alignment}")
        self._check_tensors([self._tensor(number, sizes) for number in range(num_tensors)])

    def _tensor(self, number: int, sizes: QuantSizes) -> tuple[int, int, str]:
        """A tensor's name, and start and end of its data, from the end of the header."""
        name = self._text(f"tensor {number}")
        num_dims = self._count(name, _MAX_DIMS, "I")
        dims = [self._number("Q", name) for _ in range(num_dims)]
        kind, start = self._number("I", name), self._number("Q", name)
        if kind not in sizes:
            raise self._wrong(name, f"is stored in a way that the gguf package does not know ({kind})")
        per_block, block_bytes = sizes[kind]
        if not dims or 0 in dims or dims[0] % per_block:
            raise self._wrong(name, f"has the shape {dims}, which cannot be stored so")
        return start, start + math.prod(dims) // per_block * block_bytes, name

    def _check_tensors(self, tensors: list[tuple[int, int, str]]) -> None:
        begin = -(-self._file.tell() // self._alignment) * self._alignment
        end = 0
        for start, stop, name in sorted(tensors):
            if start % self._alignment:
                raise self._wrong(name, f"begins at {start}, which is not a multiple of {self._alignment}")
            if start < end:
                raise self._wrong(name, "overlaps another tensor")
            if begin + stop > self._size:
                raise self._wrong(name, "ends beyond the end of the file")
            end = stop

    def _value(self, kind: int, key: str) -> int | float | None:
        """Read a value; a single number is returned."""
        if kind in _SCALARS:
            return self._number(_SCALARS[kind], key)
        if kind == _STRING:
            self._text(key)
            return None
        if kind != _ARRAY:
            raise self._wrong(key, f"has an unknown type ({kind})")
        of = self._number("I", key)
        if of not in _SCALARS and of != _STRING:
            raise self._wrong(key, f"is an array of a type that is not supported ({of})")
        count = self._count(key, _MAX_ITEMS)
        self._num_items += count
        if self._num_items > _MAX_ITEMS:
            raise self._wrong(key, f"brings all arrays to more than {_MAX_ITEMS} items")
        if of == _STRING:
            for _ in range(count):
                self._skip(self._count(key, _MAX_TEXT_BYTES), key)
        else:
            self._skip(count * struct.calcsize(_SCALARS[of]), key)
        return None

    def _count(self, key: str, most: int, letter: str = "Q") -> int:
        count = int(self._number(letter, key))
        if count > most:
            raise self._wrong(key, f"has a length of {count}, and may have {most}")
        return count

    def _number(self, letter: str, key: str) -> int:
        number: int = struct.unpack(self._order + letter, self._read(struct.calcsize(letter), key))[0]
        return number

    def _text(self, key: str) -> str:
        return self._read(self._count(key, _MAX_TEXT_BYTES), key).decode(errors="replace")

    def _read(self, length: int, key: str) -> bytes:
        self._skip(length, key)
        self._file.seek(-length, 1)
        return self._file.read(length)

    def _skip(self, length: int, key: str) -> None:
        end = self._file.seek(length, 1)
        if end > self._size:
            raise self._wrong(key, "goes beyond the end of the file")
        if end > _MAX_HEADER_BYTES:
            raise self._wrong(key, f"makes the header longer than {_MAX_HEADER_BYTES} bytes")

    def _wrong(self, key: str, what: str) -> ModelError:
        return ModelError(f"{self._path} is not a whole GGUF file: {one_line(shown(key))} {what}; download it again")

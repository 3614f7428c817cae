"""A GGUF file opened for reading: its metadata by key and its tensors as numpy arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tfserve.errors import ModelError
from tfserve.install_hint import install_command
from tfserve.model.gguf.header import check_header
from tfserve.model.loading.fields import Fields, one_line


class GgufFile:
    """Read-only view of one GGUF file (memory-mapped). Needs the `gguf` package, which is the extra `gguf`.

    `fields` is its metadata by key. Raises ModelError if the package is missing, or if the file is missing, is not
    GGUF, is truncated, or is one part of several.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = _open(path)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.fields = Fields(_Metadata(reader, path), path)
        self.architecture = self.fields.text("general.architecture")
        if self.fields.integer("split.count", 1, least=0) > 1:
            raise ModelError(
                f"{path} is one part of several; merge them first with llama.cpp's llama-gguf-split --merge"
            )

    def key(self, name: str) -> str:
        """The full key of architecture-specific metadata, such as `block_count`."""
        return f"{self.architecture}.{name}"

    @property
    def tensor_names(self) -> Iterable[str]:
        """Names of all tensors, in file order."""
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in torch's order (GGUF stores it reversed)."""
        return tuple(int(size) for size in reversed(self._stored(name).shape))

    def type_name(self, name: str) -> str:
        """How the tensor is stored: "F32", "BF16", "Q4_1", ..."""
        return str(self._stored(name).tensor_type.name)

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """Dequantised values, float32. Raises ModelError for a storage type that the gguf package cannot dequantise."""
        from gguf.quants import dequantize

        stored = self._stored(name)
        try:
            values: npt.NDArray[np.float32] = dequantize(stored.data, stored.tensor_type)
        except NotImplementedError:
            raise ModelError(
                f"{self.path}: tensor {name} is stored as {self.type_name(name)}, which the gguf package cannot "
                "dequantise; use a file in another quantisation, such as Q8_0"
            ) from None
        return values.reshape(self.shape(name))

    def _stored(self, name: str) -> Any:
        if name not in self._tensors:
            raise ModelError(f"{self.path} holds no tensor {name!r}; it is incomplete: download it again")
        return self._tensors[name]


class _Metadata(Mapping[str, Any]):
    """Metadata by key: str, int, float, bool or a list of these, read from the file on access."""

    def __init__(self, reader: Any, path: Path) -> None:
        self._reader, self._path = reader, path

    def __getitem__(self, key: str) -> Any:
        field = self._reader.fields[key]
        try:
            return field.contents()
        except (ValueError, IndexError) as error:  # invalid UTF-8, or an empty array
            raise ModelError(f"{self._path}: {key} cannot be read ({one_line(error)}); download it again") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._reader.fields)

    def __len__(self) -> int:
        return len(self._reader.fields)


def _open(path: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise ModelError(f"reading GGUF files needs the gguf package: {install_command('gguf')}") from None
    if not path.is_file():
        raise ModelError(f"{path} is not a file; give the path of a .gguf file")
    try:
        check_header(path, {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()})
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise ModelError(f"{path} is not a whole GGUF file ({one_line(error)}); download it again") from None

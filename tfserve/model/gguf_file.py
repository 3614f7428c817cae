"""A GGUF file opened for reading: its metadata by key and its tensors as numpy arrays."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tfserve.errors import ModelError
from tfserve.install_hint import install_command


class GgufFile:
    """Read-only view of one GGUF file (memory-mapped). Needs the `gguf` package, which is the extra `gguf`.

    Raises ModelError if the package is missing, or if the file is missing, is not GGUF, is truncated, or is one part
    of several.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = _open(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.architecture = str(self.require("general.architecture"))
        if int(self.get("split.count", 1)) > 1:
            raise ModelError(
                f"{path} is one part of several; merge them first with llama.cpp's llama-gguf-split --merge"
            )

    def get(self, key: str, default: Any = None) -> Any:
        """Value of a metadata key: str, int, float, bool or a list of these; `default` if the file has no such key."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def require(self, key: str) -> Any:
        """Value of a metadata key. Raises ModelError if the file has no such key."""
        value = self.get(key)
        if value is None:
            raise ModelError(f"{self.path} has no metadata key {key!r}; it is incomplete or very old: convert it again")
        return value

    def hyper(self, name: str, default: Any = None) -> Any:
        """Metadata that is stored under the architecture's name, such as `block_count`."""
        return self.get(f"{self.architecture}.{name}", default)

    def require_hyper(self, name: str) -> Any:
        """As `hyper`. Raises ModelError if the file has no such key."""
        return self.require(f"{self.architecture}.{name}")

    @property
    def tensor_names(self) -> Iterable[str]:
        """Names of all tensors, in file order."""
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in torch's order (GGUF stores it reversed)."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def type_name(self, name: str) -> str:
        """How the tensor is stored: "F32", "BF16", "Q4_1", ..."""
        return str(self._tensors[name].tensor_type.name)

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """Dequantised values, float32. Raises ModelError for a storage type that the gguf package cannot dequantise."""
        from gguf.quants import dequantize

        stored = self._tensors[name]
        try:
            values: npt.NDArray[np.float32] = dequantize(stored.data, stored.tensor_type)
        except NotImplementedError:
            raise ModelError(
                f"{self.path}: tensor {name} is stored as {self.type_name(name)}, which the gguf package cannot "
                "dequantise; use a file in another quantisation, such as Q8_0"
            ) from None
        return values.reshape(self.shape(name))


def _open(path: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise ModelError(f"reading GGUF files needs the gguf package: {install_command('gguf')}") from None
    if not path.is_file():
        raise ModelError(f"{path} is not a file; give the path of a .gguf file")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise ModelError(f"{path} is not a whole GGUF file ({error}); download it again") from None

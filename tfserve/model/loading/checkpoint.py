"""The tensors of a Hugging Face safetensors checkpoint, verified before the first one is used."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import safe_open
from torch import Tensor

from tfserve.errors import ModelError, failures
from tfserve.model.loading.fields import one_line, read_fields, shown
from tfserve.model.models.base import ModelConfig, stored_tensors

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_MAX_HEADER_BYTES = 16 * 2**20
"""Largest header of a file (the list of its tensors); the largest models need some hundred thousand bytes."""

_FLOAT_DTYPES = {"F64", "F32", "BF16", "F16"}
_INV_FREQ = re.compile(r".*\.rotary_emb\.inv_freq")  # a buffer that old releases of transformers saved; computed here
_QUANTISED = re.compile(
    r".*\.(qweight|qzeros|scales|g_idx|SCB|weight_(packed|scale|scale_inv|zero_point)|weight\.(absmax|quant_map|quant_state.*))"
)
"""Names of tensors that GPTQ, AWQ, bitsandbytes and compressed-tensors store with or instead of weights."""


class Checkpoint:
    """The tensors of one file or of all shards of an index, by name; a context manager, as the files stay open.

    The constructor raises ModelError for files that are missing, truncated or not safetensors.
    """

    def __init__(self, model_dir: Path) -> None:
        self._dir = model_dir
        self._open_files = ExitStack()
        self._file_of: dict[str, Any] = {}  # tensor name to the open file that holds it
        self._path_of: dict[str, Path] = {}
        for path in weight_files(model_dir):
            file = self._open(path)
            for name in file.keys():  # noqa: SIM118 - not a dict
                self._file_of[name] = file
                self._path_of[name] = path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._open_files.close()

    def verify(self, config: ModelConfig) -> None:
        """Raise ModelError unless the checkpoint holds exactly the tensors of `config`, in their shapes, as floats."""
        expected = {tensor.name: tensor.shape for tensor in stored_tensors(config)}
        found = {name for name in self._file_of if not _INV_FREQ.fullmatch(name)}
        if config.tie_word_embeddings:
            found.discard("lm_head.weight")
        if quantised := sorted(name for name in found - expected.keys() if _QUANTISED.fullmatch(name)):
            raise ModelError(
                f"{self._path_of[quantised[0]]}: the weights are quantised (it holds {quantised[0]}); give the "
                "unquantised checkpoint (int8 is made at load)"
            )
        if missing := [name for name in expected if name not in found]:
            raise self._mismatch("lacks", missing)
        if unexpected := sorted(found - expected.keys()):
            raise self._mismatch("holds unexpected", unexpected)
        for name, shape in expected.items():
            view = self._file_of[name].get_slice(name)
            if tuple(view.get_shape()) != shape:
                raise ModelError(
                    f"{self._path_of[name]}: {name} has shape {list(view.get_shape())}, but config.json makes it "
                    f"{list(shape)}: weights and config.json are of different models"
                )
            if view.get_dtype() not in _FLOAT_DTYPES:
                raise ModelError(
                    f"{self._path_of[name]}: {name} has dtype {view.get_dtype()}; supported: "
                    f"{', '.join(sorted(_FLOAT_DTYPES))}. Give the unquantised checkpoint"
                )

    def get(self, name: str) -> Tensor:
        """The tensor `name` on the CPU in the file's dtype. It may share memory with the file: copy it to keep it."""
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def _open(self, path: Path) -> Any:
        try:
            with path.open("rb") as raw:
                header_bytes = int.from_bytes(raw.read(8), "little")
            if header_bytes > _MAX_HEADER_BYTES:
                raise ValueError(f"its header has {header_bytes} bytes, and may have {_MAX_HEADER_BYTES}")
            return self._open_files.enter_context(safe_open(path, framework="pt", device="cpu"))
        except failures() as error:
            size = path.stat().st_size
            raise ModelError(
                f"{path} ({size} bytes) is truncated or not a safetensors file ({one_line(error)}); download it again"
            ) from None

    def _mismatch(self, verb: str, names: list[str]) -> ModelError:
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        return ModelError(
            f"{self._dir}: the checkpoint {verb} {shown}: its weights and config.json are of different models, "
            "or a file is missing"
        )


def weight_files(model_dir: Path) -> list[Path]:
    """The files that hold the tensors of the checkpoint in `model_dir`. Raises ModelError."""
    if (model_dir / SINGLE_FILE).is_file():
        return [model_dir / SINGLE_FILE]
    index = model_dir / INDEX_FILE
    if not index.is_file():
        others = sorted(path.name for path in model_dir.glob("*") if path.suffix in {".bin", ".gguf", ".pth"})
        hint = f"; {', '.join(others[:3])} cannot be read: convert to safetensors" if others else ""
        raise ModelError(f"no weights in {model_dir}: expected {SINGLE_FILE} or {INDEX_FILE}{hint}")
    shards = [model_dir / name for name in _shard_names(index)]
    if absent := [shard.name for shard in shards if not shard.is_file()]:
        raise ModelError(
            f"{index} names {one_line(', '.join(absent))}, which is not there: download the checkpoint again"
        )
    return shards


def _shard_names(index: Path) -> list[str]:
    fields = read_fields(index)
    if not fields.value("weight_map") or not isinstance(fields.value("weight_map"), dict):
        raise fields.error("weight_map must map tensor names to files; download it again")
    weight_map = fields.section("weight_map")
    names = {weight_map.text(tensor) for tensor in weight_map}
    for name in sorted(names):
        if name in ("", "..") or name != Path(name).name or not name.isprintable() or "\\" in name:
            raise weight_map.error(f"{shown(name)} must be the name of a file in this directory; download it again")
    return sorted(names)

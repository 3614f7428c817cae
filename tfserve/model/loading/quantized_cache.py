"""Caches the int8 form of a checkpoint between starts: quantising takes longer than the rest of a start."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tfserve.errors import failures
from tfserve.machine import usable_cpus
from tfserve.model.decoder import Decoder
from tfserve.model.layers.linear import Linear
from tfserve.model.layers.norm_and_mlp import RMSNorm
from tfserve.model.loading.checkpoint import weight_files

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 2**22
"""Bytes of a file that are read and hashed at a time, in a thread."""

_PART = ".part"
_ABANDONED_S = 3600.0
"""Suffix of a file that is being written; after this time without a change, its writer has died."""

_MAX_JSON_BYTES = 2**27
"""Larger JSON files are not part of a checkpoint (tokenizer.py)."""

_FORMAT = 2
"""Increase it when smoothing or quantisation changes: files of another version are made again."""


class QuantizedCache:
    """A cached file for a checkpoint directory, valid as long as the checkpoint's contents are the same.

    The checkpoint and the cached file are hashed completely at each start, about a second per GB and core: other
    weights may have the same sizes and times, and a damaged file must not be used. A cache that cannot be read or
    written only costs time at the next start, so neither raises.
    """

    def __init__(self, folder: Path, model_dir: Path) -> None:
        """The file is in `folder`, which need not exist."""
        model_dir = model_dir.resolve()
        name = hashlib.sha256(str(model_dir).encode()).hexdigest()[:12]
        self._path = folder / f"{model_dir.name}-{name}.safetensors"
        self._fingerprint = _fingerprint(model_dir)

    def fill(self, decoder: Decoder) -> bool:
        """Load every norm and linear of `decoder`. Without a valid file, change nothing and return False."""
        try:
            if not self._path.is_file():
                return False
            with safe_open(self._path, framework="pt", device="cpu") as file:
                told = file.metadata() or {}
                if told.get("fingerprint") != self._fingerprint:
                    return False
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            if told.get("checksum") != _checksum(tensors):
                raise ValueError("its checksum is not that of its contents")
        except failures() as error:
            logger.warning("cannot read %s (%s): quantising again", self._path, error)
            return False
        for name, module in decoder.named_modules():
            if isinstance(module, RMSNorm):
                module.load(tensors[f"{name}.weight"].clone())  # a copy, not a view of the mapped file
            elif isinstance(module, Linear):
                bias = tensors.get(f"{name}.bias")
                weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.scale"]
                module.load_quantized(weight, scale, None if bias is None else bias.clone())
        return True

    def save(self, decoder: Decoder) -> None:
        """Save the tensors of a loaded int8 `decoder`; several processes may save at the same time."""
        tensors = _tensors(decoder)
        # Not named by the process id: two containers that share a cache may have the same id.
        part = self._path.with_suffix(f".{uuid.uuid4().hex}{_PART}")
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(part.parent)
            size = sum(tensor.nbytes for tensor in tensors.values())
            if shutil.disk_usage(part.parent).free < 2 * size:
                logger.warning("int8 weights not kept in %s: %d MiB are needed there", part.parent, 2 * size >> 20)
                return
            told = {"fingerprint": self._fingerprint, "checksum": _checksum(tensors)}
            save_file(tensors, part, metadata=told)
            part.replace(self._path)
        except failures() as error:
            with suppress(OSError):
                part.unlink()
            logger.warning("cannot keep the int8 weights in %s (%s): the next start quantises again", part, error)


def _remove_abandoned(folder: Path) -> None:
    """Delete partial files of killed processes."""
    for part in folder.glob(f"*{_PART}"):
        if time.time() - part.stat().st_mtime > _ABANDONED_S:
            part.unlink(missing_ok=True)


def _tensors(decoder: Decoder) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, module in decoder.named_modules():
        if isinstance(module, RMSNorm):
            tensors[f"{name}.weight"] = module.weight
        elif isinstance(module, Linear):
            weight, scale, bias = module.quantized()
            tensors |= {f"{name}.weight": weight, f"{name}.scale": scale}
            if bias is not None:
                tensors[f"{name}.bias"] = bias
    return tensors


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """A digest of the tensors: values, names, types and shapes."""

    def digest(name: str) -> list[object]:
        tensor = tensors[name].contiguous()
        content = hashlib.sha256(tensor.view(-1).view(torch.uint8).numpy().data).hexdigest()
        return [name, str(tensor.dtype), list(tensor.shape), content]

    with ThreadPoolExecutor(_num_threads()) as pool:
        return hashlib.sha256(json.dumps(list(pool.map(digest, sorted(tensors)))).encode()).hexdigest()


def _fingerprint(model_dir: Path) -> str:
    """A digest of the weights, the model's shape, and the tokenizer, which encodes the smoothing text."""
    texts = (path for path in model_dir.glob("*.json") if path.is_file() and path.stat().st_size <= _MAX_JSON_BYTES)
    files = sorted((*weight_files(model_dir), *texts))
    chunks = [(path, start) for path in files for start in range(0, path.stat().st_size, _CHUNK_BYTES)]
    with ThreadPoolExecutor(_num_threads()) as pool:
        digests = list(pool.map(_digest, chunks))
    return hashlib.sha256(json.dumps([_FORMAT, [path.name for path in files], digests]).encode()).hexdigest()


def _digest(chunk: tuple[Path, int]) -> tuple[str, int, str]:
    path, start = chunk
    with path.open("rb") as file:
        file.seek(start)
        return path.name, start, hashlib.sha256(file.read(_CHUNK_BYTES)).hexdigest()


def _num_threads() -> int:
    return min(usable_cpus(), 16)

"""Attention over paged KV, one backend per kernel family."""

from __future__ import annotations

import logging

from tfserve.errors import ConfigError
from tfserve.install_hint import install_command
from tfserve.model.attention.base import AttentionBackend
from tfserve.model.attention.paged_backend import PagedBackend
from tfserve.model.attention.paged_kernels import FlashKernels, VarlenKernels
from tfserve.model.attention.torch_backend import TorchBackend

log = logging.getLogger(__name__)

_PAGED: dict[str, type[FlashKernels] | type[VarlenKernels]] = {
    FlashKernels.name: FlashKernels,
    VarlenKernels.name: VarlenKernels,
}
_MAX_HEAD_DIM, _HEAD_DIM_UNIT = 256, 8


def select_backend(wish: str, device: str, dtype: str, head_dim: int) -> AttentionBackend:
    """The backend that `wish` names; "auto" selects the best one for the device and logs it.

    Raises ConfigError for a backend that does not exist or cannot run here, and for a dtype that it cannot serve.
    """
    if wish not in ("auto", TorchBackend.name, *_PAGED):
        raise ConfigError(
            "attention_backend",
            f"{wish!r} does not exist in this version; available: auto, torch (needs nothing but PyTorch), "
            f"and on NVIDIA GPUs {', '.join(_PAGED)}",
        )
    if wish == "auto":
        backend = _best(device, dtype, head_dim)
        log.info("attention backend: %s (chosen for %s, %s)", backend.name, device, dtype)
    else:
        backend = TorchBackend() if wish == TorchBackend.name else _paged(wish, device, head_dim)
    names = [str(known).removeprefix("torch.") for known in backend.dtypes]
    if dtype not in names:
        raise ConfigError("dtype", f"attention backend {backend.name!r} supports {', '.join(names)}, got {dtype}")
    return backend


def _best(device: str, dtype: str, head_dim: int) -> AttentionBackend:
    """The first paged backend that runs here, else the torch backend, which runs anywhere; on a GPU with a warning."""
    if device != "cuda":
        return TorchBackend()
    reasons = []
    for name in _PAGED:
        try:
            backend = _paged(name, device, head_dim)
        except ConfigError as error:
            reasons.append(str(error))
            continue
        if any(str(known) == f"torch.{dtype}" for known in backend.dtypes):
            return backend
        reasons.append(f"{name} does not compute in {dtype}")
    log.warning("attention falls back to plain PyTorch, many times slower on a GPU: %s", "; ".join(reasons))
    return TorchBackend()


def _paged(name: str, device: str, head_dim: int) -> PagedBackend:
    """A paged backend by name. Raises ConfigError that says what is missing."""
    if device != "cuda":
        raise ConfigError("attention_backend", f"{name!r} needs an NVIDIA GPU, and the device is {device}: use torch")
    if head_dim > _MAX_HEAD_DIM or head_dim % _HEAD_DIM_UNIT:
        limits = f"multiples of {_HEAD_DIM_UNIT} up to {_MAX_HEAD_DIM}"
        raise ConfigError("attention_backend", f"{name!r} serves heads of {limits}, and this model's are {head_dim}")
    kernels = _PAGED[name].load()
    if kernels is None:
        raise ConfigError("attention_backend", f"{name!r}: {_how_to_get(name)}")
    return PagedBackend(kernels)


def _how_to_get(name: str) -> str:
    if name == FlashKernels.name:
        return f"flash-attn is not installed (or only its version 4 is): {install_command('cuda')}"
    return "this torch cannot read paged KV: it takes torch 2.12 or later"

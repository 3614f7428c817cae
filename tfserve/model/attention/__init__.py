"""Attention over paged KV, one backend per kernel family."""

from __future__ import annotations

import logging

from tfserve.errors import ConfigError
from tfserve.model.attention.base import AttentionBackend
from tfserve.model.attention.torch_backend import TorchBackend

log = logging.getLogger(__name__)


def select_backend(wish: str, device: str, dtype: str) -> AttentionBackend:
    """The backend named by `wish`; "auto" takes the best for the device and logs it.

    Raises ConfigError for a backend that does not exist, or that cannot serve this dtype.
    """
    backend = TorchBackend()
    if wish not in ("auto", backend.name):
        raise ConfigError(
            "attention_backend",
            f"{wish!r} does not exist in this version; available: auto, torch (needs nothing but PyTorch)",
        )
    names = [str(known).removeprefix("torch.") for known in backend.dtypes]
    if dtype not in names:
        raise ConfigError("dtype", f"attention backend {backend.name!r} supports {', '.join(names)}, got {dtype}")
    if wish == "auto":
        log.info("attention backend: %s (chosen for %s, %s)", backend.name, device, dtype)
    return backend

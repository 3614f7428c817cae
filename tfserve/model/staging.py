"""From the host to the device: a step's small arrays in one copy that the host does not wait for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGN = 16
"""Bytes; each array starts at a multiple, so that any element type can be viewed in the shared buffer."""


def upload(device: torch.device, *arrays: NDArray[Any]) -> list[Tensor]:
    """The arrays as tensors of their own dtypes and shapes on `device`.

    On a GPU they are views of one buffer, copied on the current stream. The host side of it is pinned memory from
    torch's caching allocator, which hands it out again only when that copy has run: no ring of our own is needed. On
    the CPU the tensors share the arrays' memory.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    begins, size = [], 0
    for array in arrays:
        begins.append(size)
        size += -(-array.nbytes // _ALIGN) * _ALIGN
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    raw = host.numpy()
    for begin, array in zip(begins, arrays, strict=True):
        raw[begin : begin + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    buffer = host.to(device, non_blocking=True)
    return [
        buffer[begin : begin + array.nbytes].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
        for begin, array in zip(begins, arrays, strict=True)
    ]

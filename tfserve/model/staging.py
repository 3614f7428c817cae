"""Between the host and the device: a step's small arrays, and what came of it, in copies that nobody waits for."""

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
    the CPU the tensors share the arrays' memory. (`tensor.to(device)` would wait: from ordinary memory, for the copy
    and for all that is on the stream before it.)
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    begins, size = [], 0
    for array in arrays:
        begins.append(size)
        size += -(-array.nbytes // _ALIGN) * _ALIGN
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    raw = host.numpy()
    for begin, array in zip(begins, arrays, strict=True):
        raw[begin : begin + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    buffer = host.to(device, non_blocking=True)
    return [
        buffer[begin : begin + array.nbytes].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
        for begin, array in zip(begins, arrays, strict=True)
    ]


class Download:
    """Tensors on their way to the host, behind the work on the current stream that makes them; any thread may wait.

    From a GPU they are copied into pinned memory, which torch's allocator keeps for as long as the copy runs. CPU
    tensors are handed on as they are: whoever downloads one must not write to it again.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors
        self._arrived: torch.cuda.Event | None = None
        if tensors[0].is_cuda:
            hosts = [torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in tensors]
            self._tensors = tuple(
                host.copy_(each, non_blocking=True) for host, each in zip(hosts, tensors, strict=True)
            )
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def lists(self) -> list[list[Any]]:
        """Each tensor as (nested) lists; waits for the device."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [each.tolist() for each in self._tensors]

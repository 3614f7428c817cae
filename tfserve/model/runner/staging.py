"""Copies of a step's small inputs to the device and of its results to the host, without waiting."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGN = 16
"""Alignment of each array in bytes, so that any element type can be a view of the shared buffer."""


def upload(device: torch.device, *arrays: NDArray[Any]) -> list[Tensor]:
    """The arrays as tensors of their own dtypes and shapes on `device`.

    On a GPU they are views of one buffer, copied on the current stream. Its host side is pinned memory of torch's
    caching allocator, which reuses it only when the copy has run. On the CPU the tensors share the arrays' memory.
    (`tensor.to(device)` from pageable memory waits for the copy and for all earlier work on the stream.)
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
    """Tensors that are copied to the host, behind the work on the current stream; any thread may wait for them.

    From a GPU they are copied into pinned memory, which torch's allocator keeps until the copy has run. CPU tensors are
    not copied: do not write to them after a download.
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

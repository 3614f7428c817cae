"""CudaLink: a load and an evict stream, and host memory that the device can reach. The thin part that needs a GPU."""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from tfserve.errors import ConfigError
from tfserve.memory.transfers.copy_runs import Rectangle
from tfserve.plan import Direction

logger = logging.getLogger(__name__)

_KIND = {Direction.LOAD: 1, Direction.STORE: 2}  # cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost


@dataclass(frozen=True, slots=True)
class CopyMark:
    """A copy's beginning and end in its stream."""

    begin: torch.cuda.Event
    end: torch.cuda.Event


class CudaLink:
    """Moves rectangles of bytes between `device_storage` and `host`, each direction on a stream of its own.

    `compute` is the stream that steps run on; marks from elsewhere are CUDA events. Host memory is registered (pinned)
    in chunks of `chunk_bytes` and given back at `close`. Raises ConfigError if the system refuses to pin it.
    """

    def __init__(
        self, device_storage: Tensor, host: npt.NDArray[Any], *, chunk_bytes: int, compute: torch.cuda.Stream
    ) -> None:
        device = device_storage.device
        self._runtime = _Runtime()
        self._device = device
        self._storage = device_storage
        self._host = host
        self._streams = {direction: torch.cuda.Stream(device) for direction in Direction}
        handles = {stream.cuda_stream for stream in (*self._streams.values(), compute)}
        # torch hands out streams from a pool of 32 in turn: two of ours could be the same one.
        if len(handles) != len(self._streams) + 1:
            raise AssertionError("load, evict and compute need three different streams")
        self._registered = self._register(host, chunk_bytes)

    def start(self, direction: Direction, what: Rectangle, after: Sequence[Any]) -> CopyMark:
        """See stream_transfers.Link; `after` are CopyMarks, or events of the compute stream."""
        stream = self._streams[direction]
        for mark in after:
            stream.wait_event(mark.end if isinstance(mark, CopyMark) else mark)
        # Blocking events put the thread that waits for them to sleep; it would take a core otherwise.
        begin, end = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
        device = self._storage.data_ptr() + what.device_offset
        host = self._host.ctypes.data + what.host_offset
        target, source = (host, device) if direction is Direction.STORE else (device, host)
        begin.record(stream)
        self._runtime.copy(target, source, what, _KIND[direction], stream)
        end.record(stream)
        return CopyMark(begin, end)

    def finish(self, mark: Any) -> float:
        """See stream_transfers.Link."""
        mark.end.synchronize()
        return float(mark.begin.elapsed_time(mark.end)) / 1e3

    def close(self) -> None:
        """Wait for both streams and unpin the host memory."""
        for stream in self._streams.values():
            stream.synchronize()
        for address in self._registered:
            self._runtime.check(torch.cuda.cudart().cudaHostUnregister(address), "cudaHostUnregister")
        self._registered = []

    def _register(self, host: npt.NDArray[Any], chunk_bytes: int) -> list[int]:
        began_s = time.monotonic()
        base: int = host.ctypes.data
        registered: list[int] = []
        for begin in range(0, host.nbytes, chunk_bytes):
            size = min(chunk_bytes, host.nbytes - begin)
            code = int(torch.cuda.cudart().cudaHostRegister(base + begin, size, 0))
            if code != 0:
                self._runtime.forget_error()
                for address in registered:
                    torch.cuda.cudart().cudaHostUnregister(address)
                raise ConfigError(
                    "host_kv_gib",
                    f"the driver pinned {begin / 2**30:.1f} of {host.nbytes / 2**30:.1f} GiB of host memory and then"
                    f" refused (CUDA error {code}); set a smaller value, or 0 for no host tier",
                )
            registered.append(base + begin)
        seconds = time.monotonic() - began_s
        logger.info("pinned %.1f GiB of host memory in %.1f s", host.nbytes / 2**30, seconds)
        return registered


class _Runtime:
    """The CUDA runtime that torch has loaded: torch itself offers no copy with a pitch."""

    def __init__(self) -> None:
        major = str(torch.version.cuda).partition(".")[0]
        self._library = ctypes.CDLL(f"libcudart.so.{major}")
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._library.cudaMemcpyAsync.argtypes = [pointer, pointer, size, ctypes.c_int, pointer]
        self._library.cudaMemcpy2DAsync.argtypes = [pointer, size, pointer, size, size, size, ctypes.c_int, pointer]

    def copy(self, target: int, source: int, what: Rectangle, kind: int, stream: torch.cuda.Stream) -> None:
        """Enqueue a copy. Raises RuntimeError if the runtime refuses it."""
        handle = stream.cuda_stream
        if what.rows == 1:
            code = self._library.cudaMemcpyAsync(target, source, what.width, kind, handle)
            self.check(code, "cudaMemcpyAsync")
            return
        code = self._library.cudaMemcpy2DAsync(
            target, what.pitch, source, what.pitch, what.width, what.rows, kind, handle
        )
        self.check(code, "cudaMemcpy2DAsync")

    def forget_error(self) -> None:
        """The runtime keeps what it refused last, and torch would report it at this thread's next kernel."""
        self._library.cudaGetLastError()

    def check(self, code: Any, call: str) -> None:
        """Raise RuntimeError unless `code` is success."""
        if int(code) != 0:
            self.forget_error()
            raise RuntimeError(f"{call} failed with CUDA error {int(code)}")

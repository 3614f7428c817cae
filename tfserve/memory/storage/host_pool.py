"""HostPool: the host tier's memory, and how many blocks fit in it. Torch-free."""

from __future__ import annotations

import contextlib
import math
import mmap

import numpy as np
import numpy.typing as npt

from tfserve.errors import ConfigError
from tfserve.memory.storage.pages import lazy_pages

_GIB = 1024**3
_KEEP_FREE = 0.1
"""Share of the memory available now that is left to everything else."""


def host_blocks(
    host_kv_gib: float, block_bytes: int, available: int, promised: int = 0, promised_by: str = "kv_cache_gib"
) -> int:
    """How many blocks of `block_bytes` (all layers, keys and values) fit in `host_kv_gib`, the reserved one included.

    `promised` of the `available` bytes (see available_bytes) are for the device's KV, by the setting `promised_by`: the
    system gives memory as it is first written, so they look free.
    0 when `host_kv_gib` is 0: no host tier. Raises ConfigError if it is too small for a block or more than there is.
    """
    if host_kv_gib == 0:
        return 0
    wanted, most = int(host_kv_gib * _GIB), int(max(0, available - promised) * (1 - _KEEP_FREE))
    if wanted > most:
        spare, wish = f"{most / _GIB:.2f}", "a smaller value"
        if promised:
            spare += f" beside the {promised / _GIB:.2f} of the device's KV ({promised_by})"
            wish += f" for host_kv_gib or {promised_by}"
        raise ConfigError(
            "host_kv_gib",
            f"{host_kv_gib:g} GiB were asked for, but this machine (or its control group) can spare {spare}; "
            f"set {wish}, or host_kv_gib to 0 for no host tier",
        )
    blocks = wanted // block_bytes
    if blocks < 2:
        raise ConfigError(
            "host_kv_gib",
            f"{host_kv_gib:g} GiB hold less than two KV blocks of {block_bytes / _GIB:.3f} GiB; "
            "set a larger value, or 0 for no host tier",
        )
    return blocks


class HostPool:
    """Memory for `num_blocks` KV blocks, each contiguous across all layers.

    `data` is `[num_blocks, *block_shape]`, with the bytes of a page in the order that the device's layout has, so that
    whole blocks are plain copies: `(layers, 2, page)` for a CPU device. The system gives the memory as it is first
    written; it begins on a page boundary, as a GPU's driver wants what it is to pin. Raises ConfigError if the system
    refuses the address range.
    """

    def __init__(self, num_blocks: int, block_shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        shape, items = (num_blocks, *block_shape), np.dtype(dtype)
        try:
            self._memory = lazy_pages(math.prod(shape) * items.itemsize)
        except OSError:
            raise ConfigError("host_kv_gib", f"cannot reserve {num_blocks} KV blocks; set a smaller value") from None
        self.data: npt.NDArray[np.generic] = np.frombuffer(self._memory, items).reshape(shape)

    def prefer_large_pages(self) -> None:
        """For a pool that is pinned, and so takes all of its memory at the start: a driver pins large pages faster."""
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                self._memory.madvise(mmap.MADV_HUGEPAGE)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return int(self.data[0].nbytes)

"""HostPool: the host tier's memory, and how many blocks fit in it. Torch-free."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from tfserve.errors import ConfigError

_GIB = 1024**3
_PAGE_BYTES = 4096
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
        try:
            self.data = _empty_pages((num_blocks, *block_shape), np.dtype(dtype))
        except MemoryError:
            raise ConfigError("host_kv_gib", f"cannot reserve {num_blocks} KV blocks; set a smaller value") from None

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return int(self.data[0].nbytes)


def _empty_pages(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> npt.NDArray[np.generic]:
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _PAGE_BYTES, np.uint8)
    skip = -raw.ctypes.data % _PAGE_BYTES
    return raw[skip : skip + nbytes].view(dtype).reshape(shape)

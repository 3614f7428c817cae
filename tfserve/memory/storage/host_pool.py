"""HostPool: the host tier's memory, and how much of it this machine can spare. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from tfserve.errors import ConfigError

_GIB = 1024**3
_PAGE_BYTES = 4096
_KEEP_FREE = 0.1
"""Share of the memory available now that is left to everything else."""


def available_bytes(proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> int:
    """Memory this process may still take: the least of what the machine has and what its control groups allow."""
    limits = [_mem_available(proc / "meminfo")]
    for group, limit_file, used_file in _control_groups(proc / "self/cgroup", sys / "fs/cgroup"):
        limit, used = _integer(group / limit_file), _integer(group / used_file)
        if limit is not None and used is not None:
            limits.append(max(0, limit - used))
    return min(limits)


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


def _mem_available(path: Path) -> int:
    for line in _lines(path):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("host_kv_gib", f"{path} does not say how much memory is available; set 0 for no host tier")


def _control_groups(listing: Path, root: Path) -> Iterator[tuple[Path, str, str]]:
    """This process's control groups and all above them, of version 2 and 1, with their limit and usage files."""
    for line in _lines(listing):
        _, controllers, path = line.split(":", 2)
        base, files = root, ("memory.max", "memory.current")
        if controllers:
            base, files = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        if not controllers or "memory" in controllers.split(","):
            group = PurePosixPath(path)
            # Inside a container the listed path may be the host's: the mounted root is then the group itself.
            for part in (group, *group.parents):
                yield base / str(part).lstrip("/"), *files


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _integer(path: Path) -> int | None:
    """A file's number; None if there is no such file, or it says "max"."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None

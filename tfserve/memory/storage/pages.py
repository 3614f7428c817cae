"""Memory for KV blocks, straight from the system. Torch-free."""

from __future__ import annotations

import mmap


def lazy_pages(num_bytes: int) -> mmap.mmap:
    """Zeroed memory that begins on a page boundary; a page takes physical memory once it is written.

    Pages are small. For numpy's and torch's arrays the system may have to make a large page free at the first write,
    which takes 20 to 30 ms of a step where memory is fragmented, and each layer has its own. Raises OSError if the
    system refuses the address range.
    """
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

"""Copies as the link moves them: runs of adjacent blocks, each one rectangle of bytes. Torch-free."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tfserve.plan import Copy

_PAGE_BYTES = 4096


def continues(copy: Copy, before: Copy) -> bool:
    """True if `copy` moves the same tokens of the blocks beside those of `before`, on both tiers."""
    same_tokens = copy.start == before.start and copy.num_tokens == before.num_tokens
    return same_tokens and copy.device_block == before.device_block + 1 and copy.host_block == before.host_block + 1


def take_run(queue: deque[Copy], joins: Callable[[Copy], bool], *, most: int, blocks_per_chunk: int) -> list[Copy]:
    """Take the head of the queue and those after it that continue it and that `joins` lets go along.

    At most `most`, and never across a multiple of `blocks_per_chunk` host blocks: chunks of host memory that were
    registered apart are not one range to the driver, and a copy over their border would be slow, or refused.
    """
    run = [queue.popleft()]
    while queue and len(run) < most and continues(queue[0], run[-1]):
        if queue[0].host_block % blocks_per_chunk == 0 or not joins(queue[0]):
            break
        run.append(queue.popleft())
    return run


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Bytes to move: `rows` rows of `width` bytes, `pitch` bytes apart on both tiers, from these offsets on."""

    device_offset: int
    host_offset: int
    width: int
    pitch: int
    rows: int

    @property
    def nbytes(self) -> int:
        """What is moved."""
        return self.width * self.rows


@dataclass(frozen=True, slots=True)
class BlockGeometry:
    """A block, on both tiers: `pages` pages (K and V of every layer), each `block_size` tokens of `row_bytes`."""

    pages: int
    block_size: int
    row_bytes: int

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.pages * self.block_size * self.row_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of a token over all layers."""
        return self.pages * self.row_bytes

    def rectangle(self, first: Copy, n: int) -> Rectangle:
        """The tokens of `first`, and the same ones of the n - 1 blocks after it on both tiers.

        Whole blocks lie without gaps. A token range leaves a gap in every page, of the same size in all of them, so
        it is one rectangle over all pages of all n blocks.
        """
        page = self.block_size * self.row_bytes
        begin = first.start * self.row_bytes
        device, host = (block * self.block_bytes + begin for block in (first.device_block, first.host_block))
        if first.num_tokens == self.block_size:
            return Rectangle(device, host, n * self.block_bytes, n * self.block_bytes, 1)
        return Rectangle(device, host, first.num_tokens * self.row_bytes, page, n * self.pages)


def blocks_per_chunk(block_bytes: int, chunk_bytes: int) -> int:
    """How many blocks to register at once: about `chunk_bytes`, ending on a boundary of the system's pages."""
    unit = _PAGE_BYTES // math.gcd(block_bytes, _PAGE_BYTES)
    return max(1, chunk_bytes // (block_bytes * unit)) * unit

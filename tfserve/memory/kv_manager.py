"""KVCacheManager: the one owner of which blocks hold which request's KV. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from tfserve.memory.block_pool import BlockPool
from tfserve.plan import BlockId
from tfserve.types import RequestId


class KVView(msgspec.Struct, frozen=True):
    """One request's KV as others may see it: how many tokens have room, in which blocks."""

    num_tokens: int
    blocks: tuple[BlockId, ...]


@dataclass(slots=True)
class _Residency:
    """A request's blocks, in order. The last may be partly filled: `num_tokens` says how far."""

    blocks: list[BlockId] = field(default_factory=list)
    num_tokens: int = 0


class KVCacheManager:
    """Hands out device blocks to requests and takes them back.

    `run_tokens` bounds the contiguous stretch that a new request is placed in, so that a few long limits do not
    scatter everybody else.
    """

    def __init__(self, pool: BlockPool, block_size: int, run_tokens: int) -> None:
        self.block_size = block_size
        self._pool = pool
        self._max_run = max(1, run_tokens // block_size)
        self._requests: dict[RequestId, _Residency] = {}

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool, the reserved one included."""
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be allocated now."""
        return self._pool.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def extend(self, req: RequestId, n: int, expected_tokens: int) -> tuple[BlockId, ...] | None:
        """Make room for n more tokens of `req`; the new blocks in order, or None (and no change) if too few are free.

        `expected_tokens` is how long the request may become: it only decides where its first block goes.
        """
        residency = self._requests.get(req) or _Residency()
        missing = self.blocks_for(residency.num_tokens + n) - len(residency.blocks)
        last = residency.blocks[-1] if residency.blocks else None
        new = self._pool.allocate(max(missing, 0), after=last, run=self._run_blocks(expected_tokens))
        if new is None:
            return None
        residency.blocks.extend(new)
        residency.num_tokens += n
        self._requests[req] = residency
        return new

    def release(self, req: RequestId) -> None:
        """Give back every block of `req`; a request that holds none is fine."""
        residency = self._requests.pop(req, None)
        if residency is not None:
            self._pool.free(residency.blocks)

    def view(self, req: RequestId) -> KVView:
        """What `req` holds; nothing is a view of zero tokens."""
        residency = self._requests.get(req) or _Residency()
        return KVView(residency.num_tokens, tuple(residency.blocks))

    def check(self) -> None:
        """Raise AssertionError unless every block is free or owned and every request has just the blocks it needs."""
        for req, residency in self._requests.items():
            if len(residency.blocks) != self.blocks_for(residency.num_tokens):
                raise AssertionError(f"{req}: {len(residency.blocks)} blocks for {residency.num_tokens} tokens")
        self._pool.check([residency.blocks for residency in self._requests.values()])

    def _run_blocks(self, expected_tokens: int) -> int:
        """The next power of two at or above the expected blocks, capped."""
        wanted = min(self.blocks_for(expected_tokens), self._max_run)
        return 1 << (wanted - 1).bit_length()

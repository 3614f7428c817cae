"""HostTier: the host's blocks, and who gives way when there are none left. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tfserve.memory.block_pool import BlockPool
from tfserve.memory.residency import KVBlock, Residency
from tfserve.plan import BlockId


class HostTier:
    """A BlockPool over host memory, or none at all: then it has no blocks to give."""

    def __init__(self, pool: BlockPool | None, block_size: int) -> None:
        self.enabled = pool is not None
        # Without a host tier, a pool that nothing is taken from keeps every other line free of the distinction.
        self.pool = pool or BlockPool(2)
        self._block_size = block_size

    @property
    def num_blocks(self) -> int:
        """All blocks, the reserved one included."""
        return self.pool.num_blocks if self.enabled else 0

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now."""
        return self.pool.num_free if self.enabled else 0

    def give(self, kv: Residency, index: int, n: int, run: int) -> bool:
        """Host blocks for n blocks of a request from `index` on; False (and no change) if too few are free."""
        if n > self.num_free:
            return False
        before = kv.blocks_by_index[index - 1].host_block if index else None
        given = self.pool.allocate(n, after=before, run=run) or ()
        for block, host_block in zip(kv.blocks_by_index[index : index + n], given, strict=True):
            block.host_block = host_block
        return True

    def make_room(self, kv: Residency, run: int, spare: Iterable[Residency]) -> int:
        """Host blocks for what `kv` has on device only; how many of its tokens have room then.

        If too few are free, the requests in `spare` lose host copies, in that order: theirs are all on device too.
        """
        first = next(
            (index for index, block in enumerate(kv.blocks_by_index) if block.host_block is None), kv.num_blocks
        )
        need = kv.num_blocks - first
        for other in spare if need > self.num_free else ():
            self._strip(other, need - self.num_free)
            if need <= self.num_free:
                break
        need = min(need, self.num_free)
        self.give(kv, first, need, run)
        return min(kv.num_tokens, (first + need) * self._block_size)

    def drop(self, block: KVBlock) -> None:
        """The request gives up this block's host copy, if it has one."""
        if block.host_block is not None:
            self.pool.free((block.host_block,))
        block.host_block, block.host_tokens, block.queued_tokens = None, 0, 0

    def check(self, requests: Iterable[Residency], in_copies: Sequence[BlockId]) -> None:
        """Raise AssertionError unless every block is free, owned or in a copy."""
        owned = [block.host_block for kv in requests for block in kv.blocks_by_index if block.host_block is not None]
        self.pool.check([owned, in_copies])

    def _strip(self, kv: Residency, n: int) -> None:
        """Take up to n host copies from the tail, short of the first one still being written."""
        for index in reversed(range(kv.num_blocks)):
            block = kv.blocks_by_index[index]
            if block.copies or n <= 0:
                return
            if block.host_block is not None:
                self.drop(block)
                kv.forget_host(index * self._block_size)
                n -= 1

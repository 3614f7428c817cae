"""DeviceTier: the device's blocks, and which of them paused requests still hold. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from tfserve.memory.block_pool import BlockPool
from tfserve.memory.residency import PAUSED, KVBlock, Residency
from tfserve.plan import BlockId, CopyDeps, CopyId, StepId


class DeviceTier:
    """A BlockPool whose free blocks include evictable ones: clean blocks of paused requests, taken when needed.

    The blocks of the most recently paused request are evicted first, tail first: the request that was paused first
    comes back first. Blocks with a store under way are *storing*: not free, but a load may take one over and wait for
    the store.

    Remembers the last step that used each block, because a load into it must wait for that step. (A step that writes a
    block needs no such care: steps run in order.)
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._last_use = [-1] * pool.num_blocks
        self._clean: dict[BlockId, tuple[Residency, KVBlock]] = {}
        self._storing: dict[BlockId, tuple[Residency, KVBlock]] = {}

    @property
    def num_blocks(self) -> int:
        """All blocks, the reserved one included."""
        return self._pool.num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give now."""
        return self._pool.num_free + len(self._clean)

    @property
    def num_storing(self) -> int:
        """Blocks that will be free when the stores on them have ended."""
        return len(self._storing)

    def allocate(self, n: int, after: BlockId | None, run: int) -> tuple[BlockId, ...] | None:
        """As BlockPool.allocate; evicts clean blocks of paused requests where free ones are too few."""
        if n > self.num_free:
            return None
        while self._pool.num_free < n:
            _, (kv, block) = self._clean.popitem()
            self.evict(kv, block)
        return self._pool.allocate(n, after=after, run=run)

    def mark_evictable(self, kv: Residency, block: KVBlock) -> None:
        """List a paused request's block as clean or, while copies hold it, as storing."""
        device_block = _place(kv, block)
        (self._storing if self._held_by_copies(device_block) else self._clean)[device_block] = (kv, block)

    def copy_ended(self, device_block: BlockId) -> None:
        """A copy has let go of this block: if it was storing, it may be clean now."""
        if device_block in self._storing and not self._held_by_copies(device_block):
            self._clean[device_block] = self._storing.pop(device_block)

    def lock(self, device_block: BlockId) -> None:
        """The block's owner is coming back: no other request may take the block."""
        self._clean.pop(device_block, None)
        self._storing.pop(device_block, None)

    def evict(self, kv: Residency, block: KVBlock) -> None:
        """The request gives up this block's place, which is free once no copy holds it."""
        device_block = _place(kv, block)
        self.lock(device_block)
        if kv.last_step is not None:
            self._last_use[device_block] = max(self._last_use[device_block], kv.last_step)
        kv.place(block, None)
        self._pool.free((device_block,))

    def take_storing(self, n: int) -> list[tuple[BlockId, CopyDeps]]:
        """Take over up to n storing blocks, the oldest first, and say what a load into each must wait for."""
        taken = []
        # The oldest entries are the stores that end first.
        for device_block, (kv, block) in list(self._storing.items())[:n]:
            stores = tuple(block.copies)
            self._pool.retain((device_block,))
            self.evict(kv, block)
            taken.append((device_block, self.after(device_block, stores)))
        return taken

    def after(self, device_block: BlockId, copies: tuple[CopyId, ...] = ()) -> CopyDeps:
        """What a load into this block must wait for: the last step that used it, and `copies`."""
        step = self._last_use[device_block]
        return CopyDeps(StepId(step) if step >= 0 else None, copies)

    def stores_under_way(self) -> tuple[CopyId, ...]:
        """The stores under way on blocks of paused requests."""
        return tuple(chain.from_iterable(block.copies for _, block in self._storing.values()))

    def check(self, requests: Iterable[Residency], in_copies: Sequence[BlockId]) -> None:
        """Raise AssertionError unless every block is free, owned or in a copy, and blocks of paused requests listed."""
        requests = list(requests)
        self._pool.check([*(kv.blocks for kv in requests), in_copies])
        held = {
            block.device_block: self._held_by_copies(block.device_block)
            for kv in requests
            if kv.state in PAUSED
            for block in kv.blocks_by_index
            if block.device_block is not None
        }
        listed = dict.fromkeys(self._clean, False) | dict.fromkeys(self._storing, True)
        if listed != held or len(listed) != len(self._clean) + len(self._storing):
            raise AssertionError("the lists of paused requests' blocks are not what those requests hold")

    def _held_by_copies(self, device_block: BlockId) -> bool:
        """True if an owned block has more holders than its owner."""
        return self._pool.references(device_block) > 1


def _place(kv: Residency, block: KVBlock) -> BlockId:
    if block.device_block is None:
        raise AssertionError(f"{kv.req}: the block has no place on the device")
    return block.device_block

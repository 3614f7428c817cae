"""CopyLedger: the copies under way, each holding on to its two blocks until it has ended. Torch-free."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from tfserve.memory.block_pool import BlockPool
from tfserve.memory.residency import KVBlock, Residency
from tfserve.plan import Copy, CopyDeps, CopyId, Direction


@dataclass(frozen=True, slots=True)
class CopyInFlight:
    """A copy under way and what it is for: block `index` of a request."""

    copy: Copy
    owner: Residency
    block: KVBlock
    index: int

    @property
    def wanted(self) -> bool:
        """False once the request no longer cares: only the copy's blocks wait for its end."""
        return self.copy.id in self.block.copies


class CopyLedger:
    """Names copies and keeps a reference on both blocks of each until it ends.

    That reference is what parks a block whose owner has left: it is free when the last copy on it has ended.
    """

    def __init__(self, device: BlockPool, host: BlockPool) -> None:
        self._device = device
        self._host = host
        self._copies: dict[CopyId, CopyInFlight] = {}
        self._withdrawn: set[CopyId] = set()
        self._ids = itertools.count()
        self._tokens = {Direction.STORE: 0, Direction.LOAD: 0}

    def begin(self, owner: Residency, index: int, direction: Direction, tokens: range, after: CopyDeps) -> Copy:
        """A new copy of `tokens` (their places in the block) of block `index`, which has a place on both tiers."""
        block = owner.blocks_by_index[index]
        if block.device_block is None or block.host_block is None:
            raise AssertionError(f"{owner.req}: block {index} has no place to copy from, or none to copy to")
        copy = Copy(
            CopyId(next(self._ids)), direction, block.device_block, block.host_block, tokens.start, len(tokens), after
        )
        self._device.retain((copy.device_block,))
        self._host.retain((copy.host_block,))
        self._copies[copy.id] = CopyInFlight(copy, owner, block, index)
        self._tokens[direction] += copy.num_tokens
        block.copies.append(copy.id)
        return copy

    def end(self, copy_id: CopyId) -> CopyInFlight:
        """The copy has ended (or will never start): let go of its blocks. AssertionError if it is not under way."""
        flight = self._copies.pop(copy_id, None)
        if flight is None:
            raise AssertionError(f"copy {copy_id} is not under way: unknown, or ended twice")
        self._withdrawn.discard(copy_id)
        self._device.free((flight.copy.device_block,))
        self._host.free((flight.copy.host_block,))
        self._tokens[flight.copy.direction] -= flight.copy.num_tokens
        return flight

    def withdraw(self, block: KVBlock) -> None:
        """This block's copies are no longer needed: copies that have not started may be cancelled."""
        self._withdrawn.update(block.copies)
        block.copies.clear()
        block.load = None

    def take_withdrawn(self) -> set[CopyId]:
        """The copies withdrawn since the last call."""
        taken, self._withdrawn = self._withdrawn, set()
        return taken

    def num_tokens(self, direction: Direction) -> int:
        """Tokens under way in one direction: the queue that a new copy joins."""
        return self._tokens[direction]

    def __iter__(self) -> Iterator[CopyInFlight]:
        return iter(self._copies.values())

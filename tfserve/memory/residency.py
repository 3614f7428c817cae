"""Residency: where one request's KV is, block by block.

Torch-free. KVCacheManager alone changes what is here.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tfserve.memory.kv_counters import KVCounters
from tfserve.plan import BlockId, CopyId, StepId
from tfserve.types import RequestId


class KVState(enum.IntEnum):
    """Where a request's KV is.

    NONE: nowhere. DEVICE: all on device, it may run. STORING: paused, the dirty part on its way to host. HOST: paused,
    all on host (device blocks not yet needed by others stay its own). PARTIAL: coming back, not every block has a place
    on the device yet. LOADING: coming back, every block has its place and the last loads are under way.
    """

    NONE = 0
    DEVICE = 1
    STORING = 2
    HOST = 3
    PARTIAL = 4
    LOADING = 5


PAUSED = (KVState.STORING, KVState.HOST)
RESUMING = (KVState.PARTIAL, KVState.LOADING)

TRANSITIONS: dict[KVState, frozenset[KVState]] = {
    KVState.NONE: frozenset({KVState.DEVICE}),
    KVState.DEVICE: frozenset({*PAUSED, KVState.NONE}),
    KVState.STORING: frozenset({*RESUMING, KVState.HOST, KVState.DEVICE, KVState.NONE}),
    KVState.HOST: frozenset({*RESUMING, KVState.DEVICE, KVState.NONE}),
    KVState.PARTIAL: frozenset({*PAUSED, KVState.LOADING, KVState.DEVICE, KVState.NONE}),
    KVState.LOADING: frozenset({*PAUSED, KVState.DEVICE, KVState.NONE}),
}
"""From PAUSED or RESUMING straight to DEVICE: every block was still (or just became) resident."""


class KVView(Protocol):
    """One request's KV as others may see it; live, not a copy."""

    @property
    def state(self) -> KVState:
        """Where the KV is."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens that have KV, or room for it in the step being planned."""
        ...

    @property
    def num_host_tokens(self) -> int:
        """The cursor: tokens [0, this) are on host and acknowledged."""
        ...

    @property
    def num_dirty_tokens(self) -> int:
        """Tokens whose KV is on the device only, as far as is acknowledged."""
        ...

    @property
    def num_blocks(self) -> int:
        """Blocks that the tokens take, on whichever tier."""
        ...

    @property
    def num_device_blocks(self) -> int:
        """Device blocks held, those with a load under way included."""
        ...

    @property
    def blocks(self) -> tuple[BlockId, ...]:
        """The device blocks held, in order: the whole block table in state DEVICE. Built anew on each call."""
        ...


class _NoKV:
    """KVView of a request without KV."""

    state = KVState.NONE
    num_tokens = num_host_tokens = num_dirty_tokens = num_blocks = num_device_blocks = 0
    blocks: tuple[BlockId, ...] = ()


NO_KV: KVView = _NoKV()


@dataclass(slots=True, eq=False)
class KVBlock:
    """One block of one request on both tiers.

    Tokens [0, host_tokens) of it are on host and acknowledged, [0, queued_tokens) stored or on their way. `copies` are
    those under way that still matter to the request.
    """

    device_block: BlockId | None
    host_block: BlockId | None = None
    host_tokens: int = 0
    queued_tokens: int = 0
    load: CopyId | None = None
    copies: list[CopyId] = field(default_factory=list)


class Residency:
    """One request's blocks on both tiers, and which steps wrote them; KVView for others.

    `last_step` is the step that used the blocks last, or will: it is being planned. `num_queued_tokens`: tokens
    [0, this) are stored or on their way. `num_loads` counts the loads that a resume still waits for. Its counters are
    in `row` of the table that `counters` are columns of.
    """

    __slots__ = (
        "_counters",
        "blocks_by_index",
        "last_step",
        "num_loads",
        "num_queued_tokens",
        "req",
        "row",
        "settled_step",
        "settled_tokens",
        "state",
    )

    def __init__(self, req: RequestId, counters: KVCounters) -> None:
        self.req = req
        self.row = counters.ref(req)
        self.state = KVState.NONE
        self.blocks_by_index: list[KVBlock] = []
        self.last_step: StepId | None = None
        self.settled_step: StepId | None = None
        self.settled_tokens = 0
        self.num_queued_tokens = 0
        self.num_loads = 0
        self._counters = counters

    @property
    def num_tokens(self) -> int:
        """Tokens that have KV, or room for it."""
        return self._counters.num_computed[self.row.index]

    @property
    def num_host_tokens(self) -> int:
        """The cursor."""
        return self._counters.host_tokens[self.row.index]

    @property
    def num_dirty_tokens(self) -> int:
        """Tokens beyond the cursor."""
        return self.num_tokens - self.num_host_tokens

    @property
    def num_blocks(self) -> int:
        """Blocks on whichever tier."""
        return len(self.blocks_by_index)

    @property
    def num_device_blocks(self) -> int:
        """Device blocks held."""
        return self._counters.device_blocks[self.row.index]

    @property
    def blocks(self) -> tuple[BlockId, ...]:
        """The device blocks held, in order."""
        return tuple(block.device_block for block in self.blocks_by_index if block.device_block is not None)

    def move_to(self, state: KVState) -> None:
        """Change state; AssertionError if TRANSITIONS does not allow it."""
        old = self.state
        if state is old:
            return
        if state not in TRANSITIONS[old]:
            raise AssertionError(f"{self.req}: KV cannot go from {old.name} to {state.name}")
        self.state = state

    def grow(self, n: int, step: StepId, new_blocks: Sequence[BlockId]) -> None:
        """Count n tokens that `step` writes, and the blocks they need."""
        if self.last_step != step:
            self.settled_tokens = self.num_tokens
            self.settled_step = self.last_step
            self.last_step = step
        self._counters.num_computed[self.row.index] += n
        if new_blocks:
            self.blocks_by_index.extend(KVBlock(device_block) for device_block in new_blocks)
            self._counters.device_blocks[self.row.index] += len(new_blocks)

    def place(self, block: KVBlock, device_block: BlockId | None) -> None:
        """Give a block a place on the device, or take it away."""
        self._counters.device_blocks[self.row.index] += (device_block is not None) - (block.device_block is not None)
        block.device_block = device_block

    def shrink(self, num_tokens: int) -> None:
        """Forget tokens [num_tokens, ...); their blocks must be empty-handed by now."""
        self._counters.num_computed[self.row.index] = num_tokens
        self.settled_tokens = min(self.settled_tokens, num_tokens)
        self.num_queued_tokens = min(self.num_queued_tokens, num_tokens)
        self.set_cursor(min(self.num_host_tokens, num_tokens))

    def forget_host(self, num_tokens: int) -> None:
        """Tokens [num_tokens, ...) have no host copy any more."""
        self.num_queued_tokens = min(self.num_queued_tokens, num_tokens)
        self.set_cursor(min(self.num_host_tokens, num_tokens))

    def set_cursor(self, num_tokens: int) -> None:
        """Tokens [0, num_tokens) are on host and acknowledged."""
        self._counters.host_tokens[self.row.index] = num_tokens

    def advance_cursor(self, block_size: int) -> None:
        """Move the cursor over every block whose part on host is acknowledged."""
        cursor, end = self.num_host_tokens, self.num_tokens
        while cursor < end:
            index = cursor // block_size
            there = self.blocks_by_index[index].host_tokens
            cursor = index * block_size + there
            if there < block_size:
                break
        self.set_cursor(cursor)

    def tokens_in(self, index: int, block_size: int) -> int:
        """How many tokens the block at `index` holds."""
        return min(block_size, self.num_tokens - index * block_size)

    def written(self, planned: StepId) -> tuple[int, StepId | None]:
        """How many tokens steps before `planned` have written or will, and the last of those steps."""
        if self.last_step == planned:
            return self.settled_tokens, self.settled_step
        return self.num_tokens, self.last_step

    def check(self, block_size: int) -> None:
        """Raise AssertionError unless blocks, counters and state agree."""
        blocks, state = self.blocks_by_index, self.state
        self._require(len(blocks) == -(-self.num_tokens // block_size), "has not just the blocks its tokens take")
        self._require(
            self.num_device_blocks == sum(b.device_block is not None for b in blocks), "miscounts device blocks"
        )
        self._require(self.num_loads == sum(b.load is not None for b in blocks), "miscounts loads")
        cursor = 0
        for index, block in enumerate(blocks):
            tokens = self.tokens_in(index, block_size)
            self._require(0 <= block.host_tokens <= block.queued_tokens <= tokens, f"block {index}: host > computed")
            self._require(block.host_block is not None or block.queued_tokens == 0, f"block {index}: stored nowhere")
            on_device = block.device_block is not None and block.load is None
            safe = on_device or block.host_tokens == tokens or (bool(block.copies) and block.queued_tokens == tokens)
            self._require(safe, f"block {index} is lost")
            if cursor == index * block_size:
                cursor += block.host_tokens
        self._require(cursor == self.num_host_tokens, f"cursor {self.num_host_tokens}, but {cursor} are on host")
        self._require(cursor <= self.num_queued_tokens <= self.num_tokens, "queued tokens out of bounds")
        self._require(self.settled_tokens <= self.num_tokens, "settled beyond computed")
        whole = self.num_device_blocks == len(blocks)
        agree = {
            KVState.NONE: not blocks,
            KVState.DEVICE: bool(blocks) and whole and self.num_loads == 0,
            KVState.STORING: self.num_dirty_tokens > 0 and self.num_loads == 0,
            KVState.HOST: self.num_dirty_tokens == 0 and self.num_loads == 0,
            KVState.PARTIAL: not whole,
            KVState.LOADING: whole and self.num_loads > 0,
        }
        self._require(agree[state], f"blocks are not as state {state.name} says")

    def _require(self, ok: bool, what: str) -> None:
        if not ok:
            raise AssertionError(f"{self.req}: {what}")

"""KVCacheManager: the one owner of which blocks of which tier hold which request's KV. Torch-free.

The device pool is a cache over the host pool. Nothing is moved here: methods answer with the copies to make, and only
`ack` frees a block or moves a cursor. Every copy names what must have ended before it may start.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from tfserve.memory.block_pool import BlockPool
from tfserve.memory.copy_ledger import CopyInFlight, CopyLedger
from tfserve.memory.device_tier import DeviceTier
from tfserve.memory.host_tier import HostTier
from tfserve.memory.kv_counters import KVCounters
from tfserve.memory.residency import NO_KV, PAUSED, RESUMING, KVBlock, KVState, KVView, Residency
from tfserve.plan import Ack, BlockId, Copy, CopyDeps, CopyId, Direction, StepId
from tfserve.types import RequestId


class OffloadOptions(msgspec.Struct, frozen=True):
    """How the host tier is used. The switches are for ablations; offload itself is off where there is no host pool.

    `write_through` stores while requests run, not only when they are preempted. `load_evict_overlap` lets loads start
    before the evictions they displace are all done. Write-through stores end at multiples of `store_chunk_tokens`.
    """

    write_through: bool = True
    load_evict_overlap: bool = True
    store_chunk_tokens: int = 32


def store_chunk_of(block_size: int) -> int:
    """Tokens that write-through stores at a time: 32, or a whole block where 32 does not divide it."""
    store_chunk = OffloadOptions().store_chunk_tokens
    return store_chunk if block_size % store_chunk == 0 else block_size


class KVCacheManager:
    """Hands out device blocks, and moves requests between the tiers.

    A paused request's device blocks stay its own until another request needs them: the clean ones count as free, the
    ones still being stored can be reserved by a load, which then waits for the store. Blocks of the most recently
    paused go first, from the tail: the request paused first comes back first.

    When the host pool is full, write-through stops; a preemption takes the host copies of running requests, those
    first that come last in the write order (least likely to be preempted), and what then has no room is dropped from
    the request's tail: `view(req).num_tokens` says what is left, the rest is computed again. Host copies of paused
    requests are never taken. So a preemption always frees device memory and nothing waits for host memory.

    How much KV each request has is written to `counters`, and kept nowhere else.

    `run_tokens` bounds the contiguous stretch that a new request is placed in, so that a few long limits do not
    scatter all other requests.
    """

    def __init__(
        self,
        counters: KVCounters,
        pool: BlockPool,
        block_size: int,
        run_tokens: int,
        host: BlockPool | None = None,
        *,
        options: OffloadOptions | None = None,
    ) -> None:
        self.block_size = block_size
        self.num_dropped_tokens = 0
        self._options = options or OffloadOptions()
        self._device = DeviceTier(pool)
        self._host = HostTier(host, block_size)
        self._store_chunk = min(self._options.store_chunk_tokens, block_size)
        if block_size % self._store_chunk:
            raise ValueError(f"store_chunk_tokens {self._store_chunk} must divide the block size {block_size}")
        self._max_run = max(1, run_tokens // block_size)
        self._requests: dict[RequestId, Residency] = {}
        self._counters = counters
        self._copies = CopyLedger(pool, self._host.pool)
        self._step = StepId(0)
        self._write_order: Sequence[RequestId] = ()

    @property
    def num_blocks(self) -> int:
        """Blocks in the device pool, the reserved one included."""
        return self._device.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Device blocks that can be allocated now: free, or clean and of a paused request."""
        return self._device.num_free

    @property
    def num_storing_blocks(self) -> int:
        """Device blocks of paused requests that become free when their stores are acknowledged."""
        return self._device.num_storing

    @property
    def num_host_blocks(self) -> int:
        """Blocks in the host pool, the reserved one included; 0 without offload."""
        return self._host.num_blocks

    @property
    def num_free_host_blocks(self) -> int:
        """Host blocks that can be allocated now."""
        return self._host.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def num_queued_tokens(self, direction: Direction) -> int:
        """Tokens in copies that have not ended: the queue that a new copy joins."""
        return self._copies.num_tokens(direction)

    def view(self, req: RequestId) -> KVView:
        """Where `req`'s KV is; live. A request without KV is a view of zero tokens in state NONE."""
        return self._requests.get(req) or NO_KV

    def begin_step(self, step: StepId) -> None:
        """What follows is planned for `step`: `extend` makes room that it writes."""
        self._step = step

    def extend(self, req: RequestId, n: int, expected_tokens: int) -> tuple[BlockId, ...] | None:
        """Make room for n more tokens of `req`, which the step being planned writes; the request must be on device.

        The new blocks in order, or None (and no change) if too few are free. `expected_tokens` is how long the request
        may become: it only decides where its first block goes.
        """
        kv = self._requests.get(req) or Residency(req, self._counters)
        state = kv.state
        if state is not KVState.DEVICE and state is not KVState.NONE:
            raise AssertionError(f"{req}: cannot run in KV state {state.name}")
        missing = self.blocks_for(kv.num_tokens + n) - kv.num_blocks
        new: tuple[BlockId, ...] = ()
        if missing > 0:
            after = kv.blocks_by_index[-1].device_block if kv.num_blocks else None
            allocated = self._device.allocate(missing, after, self._run_blocks(expected_tokens))
            if allocated is None:
                return None
            new = allocated
        if state is KVState.NONE:
            self._requests[req] = kv
            kv.move_to(KVState.DEVICE)
        kv.grow(n, self._step, new)
        return new

    def plan_stores(self, order: Sequence[RequestId], budget_tokens: int) -> list[Copy]:
        """Write-through: store what earlier steps wrote, whole store chunks, request by request in `order`.

        Stops at the budget (which it passes by less than a chunk), and at blocks for which the host pool has no room.
        `order` is remembered: when the host is full, host copies are dropped from its end first.
        """
        self._write_order = order
        copies: list[Copy] = []
        if not (self._host.enabled and self._options.write_through):
            return copies
        for req in order:
            if budget_tokens <= 0:
                break
            kv = self._requests.get(req)
            if kv is None or kv.state is not KVState.DEVICE:
                continue
            written, step = kv.written(self._step)
            end = written - written % self._store_chunk
            while kv.num_queued_tokens < end and budget_tokens > 0:
                index = kv.num_queued_tokens // self.block_size
                if kv.blocks_by_index[index].host_block is None and not self._host.give(
                    kv, index, 1, self._run_blocks(end)
                ):
                    break
                most = -(-budget_tokens // self._store_chunk) * self._store_chunk
                copy = self._store(kv, index, min(end, kv.num_queued_tokens + most), step)
                if copy is not None:
                    copies.append(copy)
                    budget_tokens -= copy.num_tokens
        return copies

    def preempt(self, req: RequestId) -> list[Copy]:
        """Pause a request: its clean blocks are free from now on, the dirty ones once these stores are acknowledged.

        Also takes back a resume that is not finished. Without a host tier, or without room in it, KV is dropped: see
        `view(req)` for what is left (state NONE: nothing).
        """
        kv = self._requests.get(req)
        if kv is None:
            return []
        self._lose(kv, self._make_host_room(kv))
        if kv.state is KVState.NONE:
            return []
        copies: list[Copy] = []
        for index, block in enumerate(kv.blocks_by_index):
            if block.load is not None:
                self._withdraw(kv, block)
                self._device.evict(kv, block)
            if block.device_block is None:
                continue
            copy = self._store(kv, index, kv.num_tokens, kv.last_step)
            if copy is not None:
                copies.append(copy)
            self._device.mark_evictable(kv, block)
        kv.move_to(KVState.STORING if kv.num_dirty_tokens else KVState.HOST)
        return copies

    def resume(self, req: RequestId, max_blocks: int) -> list[Copy]:
        """Bring a paused request back, as far as at most `max_blocks` more device blocks allow.

        In state PARTIAL call again, once blocks are free or stores have ended. The request may run in state DEVICE.
        """
        kv = self._requests.get(req)
        if kv is None:
            raise AssertionError(f"{req}: nothing to resume, it has no KV")
        if kv.state in PAUSED:
            for block in kv.blocks_by_index:
                if block.device_block is not None:
                    self._device.lock(block.device_block)
        elif kv.state is not KVState.PARTIAL:
            raise AssertionError(f"{req}: nothing to resume in KV state {kv.state.name}")
        missing = [
            index
            for index, block in enumerate(kv.blocks_by_index)
            if block.device_block is None and block.host_tokens == kv.tokens_in(index, self.block_size)
        ]
        places = self._places_for_loads(kv, missing[:max_blocks])
        copies = [
            self._load(kv, index, device_block, after)
            for index, (device_block, after) in zip(missing, places, strict=False)
        ]
        self._settle(kv)
        return copies

    def release(self, req: RequestId) -> None:
        """Forget a request that has finished, or is to be computed again; one that holds nothing is fine.

        Blocks with a copy under way become free when it ends.
        """
        kv = self._requests.get(req)
        if kv is not None:
            self._truncate(kv, 0)

    def ack(self, ack: Ack) -> RequestId | None:
        """Take note that a copy has ended; the request whose resume has ended with it, if one has.

        That request is in state DEVICE, or, if the copy failed, with fewer tokens than before, or in state NONE.
        """
        flight = self._copies.end(ack.id)
        self._device.copy_ended(flight.copy.device_block)
        if not flight.wanted:
            return None
        flight.block.copies.remove(ack.id)
        kv, resuming = flight.owner, flight.owner.state in RESUMING
        if flight.copy.direction is Direction.STORE:
            self._stored(flight, ack.ok)
        else:
            self._loaded(flight, ack.ok)
        if kv.state in RESUMING:
            self._settle(kv)
        return kv.req if resuming and kv.state not in RESUMING else None

    def take_withdrawn(self) -> set[CopyId]:
        """Copies that are no longer needed, since the last call: pass them to TransferEngine.cancel."""
        return self._copies.take_withdrawn()

    def cancelled(self, ids: Iterable[CopyId]) -> None:
        """These copies will never start nor be acknowledged (TransferEngine.cancel said so)."""
        for copy_id in ids:
            flight = self._copies.end(copy_id)
            self._device.copy_ended(flight.copy.device_block)
            if flight.wanted:
                raise AssertionError(f"copy {copy_id} was cancelled, but its request still needs it")

    def check(self) -> None:
        """Raise AssertionError unless every block of both tiers is free, owned or in a copy, and all counts agree."""
        for req, kv in self._requests.items():
            if kv.req != req or kv.state is KVState.NONE:
                raise AssertionError(f"{req}: listed without KV")
            if kv.row is not self._counters.ref(req):
                raise AssertionError(f"{req}: its counters are in the row of another request")
            kv.check(self.block_size)
        self._device.check(self._requests.values(), [flight.copy.device_block for flight in self._copies])
        self._host.check(self._requests.values(), [flight.copy.host_block for flight in self._copies])

    def _run_blocks(self, expected_tokens: int) -> int:
        """The next power of two at or above the expected blocks, capped."""
        wanted = min(self.blocks_for(expected_tokens), self._max_run)
        return 1 << (wanted - 1).bit_length()

    def _store(self, kv: Residency, index: int, end: int, step: StepId | None) -> Copy | None:
        """Store what block `index` has up to token `end` of the request and is not queued; `step` wrote the last."""
        block = kv.blocks_by_index[index]
        todo = range(block.queued_tokens, min(self.block_size, end - index * self.block_size))
        copy = None
        if todo:
            copy = self._copies.begin(kv, index, Direction.STORE, todo, CopyDeps(step))
            block.queued_tokens = todo.stop
        kv.num_queued_tokens = max(kv.num_queued_tokens, index * self.block_size + block.queued_tokens)
        return copy

    def _stored(self, flight: CopyInFlight, ok: bool) -> None:
        """A store has ended. A failed one is planned again, unless the device may not have the tokens much longer."""
        kv, block, copy = flight.owner, flight.block, flight.copy
        # A copy beyond a failed one proves nothing about the tokens between.
        if ok and copy.start <= block.host_tokens:
            block.host_tokens = max(block.host_tokens, copy.start + copy.num_tokens)
            block.queued_tokens = max(block.host_tokens, block.queued_tokens)
            kv.advance_cursor(self.block_size)
            kv.num_queued_tokens = max(kv.num_queued_tokens, kv.num_host_tokens)
        elif not ok and copy.start + copy.num_tokens > block.host_tokens:
            block.queued_tokens = block.host_tokens
            end = flight.index * self.block_size + block.host_tokens
            kv.num_queued_tokens = min(kv.num_queued_tokens, end)
            if block.device_block is None or kv.state in PAUSED:
                self._lose(kv, end)
        if kv.state is KVState.STORING and kv.num_dirty_tokens == 0:
            kv.move_to(KVState.HOST)

    def _load(self, kv: Residency, index: int, device_block: BlockId, after: CopyDeps) -> Copy:
        block = kv.blocks_by_index[index]
        kv.place(block, device_block)
        copy = self._copies.begin(kv, index, Direction.LOAD, range(block.host_tokens), after)
        block.load = copy.id
        kv.num_loads += 1
        return copy

    def _loaded(self, flight: CopyInFlight, ok: bool) -> None:
        """A load has ended. What a failed one was to bring, and what follows it, is to be computed again."""
        flight.block.load = None
        flight.owner.num_loads -= 1
        if not ok:
            self._lose(flight.owner, flight.index * self.block_size)

    def _places_for_loads(self, kv: Residency, missing: Sequence[int]) -> list[tuple[BlockId, CopyDeps]]:
        """Device blocks for (the first of) these block indices, and what each load has to wait for."""
        if not missing:
            return []
        now = min(len(missing), self._device.num_free)
        before = kv.blocks_by_index[missing[0] - 1].device_block if missing[0] else None
        free = self._device.allocate(now, before, self._run_blocks(kv.num_tokens)) or ()
        if self._options.load_evict_overlap:
            places = [(block, self._device.after(block)) for block in free]
            return places + self._device.take_storing(len(missing) - now)
        stores = self._device.stores_under_way()
        return [(block, self._device.after(block, stores)) for block in free]

    def _settle(self, kv: Residency) -> None:
        """The state of a request that is coming back, from its blocks."""
        if kv.num_device_blocks < kv.num_blocks:
            kv.move_to(KVState.PARTIAL)
        else:
            kv.move_to(KVState.LOADING if kv.num_loads else KVState.DEVICE)

    def _make_host_room(self, kv: Residency) -> int:
        """Room on host for all of a request, as far as there is; for how many of its tokens."""
        if not self._host.enabled:
            return 0
        others = (self._requests.get(req) for req in reversed(self._write_order))
        spare = (other for other in others if other and other is not kv and other.state is KVState.DEVICE)
        return self._host.make_room(kv, self._run_blocks(kv.num_tokens), spare)

    def _lose(self, kv: Residency, num_tokens: int) -> None:
        """Tokens from `num_tokens` on have lost their KV and will be computed again."""
        self.num_dropped_tokens += max(0, kv.num_tokens - num_tokens)
        self._truncate(kv, num_tokens)

    def _truncate(self, kv: Residency, num_tokens: int) -> None:
        """Keep the KV of the first `num_tokens` tokens."""
        if num_tokens >= kv.num_tokens:
            return
        keep = self.blocks_for(num_tokens)
        for block in kv.blocks_by_index[keep:]:
            self._withdraw(kv, block)
            if block.device_block is not None:
                self._device.evict(kv, block)
            self._host.drop(block)
        del kv.blocks_by_index[keep:]
        kv.shrink(num_tokens)
        if keep == 0:
            del self._requests[kv.req]
            kv.move_to(KVState.NONE)
        elif num_tokens % self.block_size:
            last = kv.blocks_by_index[-1]
            self._withdraw(kv, last)
            last.host_tokens = last.queued_tokens = min(last.host_tokens, num_tokens % self.block_size)
            if last.device_block is not None:
                self._device.evict(kv, last)

    def _withdraw(self, kv: Residency, block: KVBlock) -> None:
        """The copies of this block are no longer needed."""
        kv.num_loads -= block.load is not None
        self._copies.withdraw(block)

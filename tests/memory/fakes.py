"""A device whose KV is one number per token, so that what a request reads back can be compared with what it wrote."""

from __future__ import annotations

from collections import deque

import numpy as np

from tests.copy_queues import CopyQueues
from tfserve.engine.scheduling.table import RequestTable, RowRef
from tfserve.memory.block_pool import BlockPool
from tfserve.memory.kv_manager import KVCacheManager, OffloadOptions
from tfserve.memory.residency import KVState
from tfserve.plan import Ack, Copy, Direction, StepId


def kv_value(req: str, position: int) -> int:
    """What the KV of a token is: different for every request and position."""
    return int(req) * 1_000_003 + position + 1


class FakeDevice(CopyQueues):
    """Two arrays, queued steps and queued copies; nothing happens until the test says so.

    A TransferEngine, too. With `honour_after` off, copies do not wait for anything: the control of the race tests.
    """

    def __init__(self, num_blocks: int, num_host_blocks: int, block_size: int, honour_after: bool = True) -> None:
        super().__init__()
        self.block_size = block_size
        self.honour_after = honour_after
        self.device = np.zeros((num_blocks, block_size), np.int64)
        self.host = np.zeros((num_host_blocks, block_size), np.int64)
        self.steps: deque[tuple[StepId, list[tuple[str, int, int, tuple[int, ...]]]]] = deque()
        self.acks: dict[Direction, deque[Ack]] = {direction: deque() for direction in Direction}
        self.moved: list[Copy] = []

    def launch(self, step: StepId, seqs: list[tuple[str, int, int, tuple[int, ...]]]) -> None:
        """Queue a step: each (req, start, n, blocks) writes tokens [start, start + n) and reads all up to there."""
        self.steps.append((step, seqs))

    def run_step(self) -> list[str]:
        """Run the oldest step; the requests that did not read what they had written."""
        step, seqs = self.steps.popleft()
        for req, start, n, blocks in seqs:
            for position in range(start, start + n):
                self.device[blocks[position // self.block_size], position % self.block_size] = kv_value(req, position)
        wrong = [req for req, start, n, blocks in seqs if not self.holds(req, start + n, blocks)]
        self.complete(step)
        return wrong

    def holds(self, req: str, num_tokens: int, blocks: tuple[int, ...]) -> bool:
        """True if these blocks hold a request's first tokens."""
        seen = self.device[list(blocks)].ravel()[:num_tokens]
        return seen.tolist() == [kv_value(req, position) for position in range(num_tokens)]

    def move(self, direction: Direction, ok: bool = True) -> bool:
        """Run (or fail) the first copy of a direction; False if there is none or it has to wait."""
        queue = self.queues[direction]
        if not queue or (
            self.honour_after and not (self.step_has_passed(queue[0]) and self.copies_have_ended(queue[0]))
        ):
            return False
        copy = queue.popleft()
        here = self.device[copy.device_block, copy.start : copy.start + copy.num_tokens]
        there = self.host[copy.host_block, copy.start : copy.start + copy.num_tokens]
        target, source = (there, here) if direction is Direction.STORE else (here, there)
        target[:] = source if ok else -1
        self.pending.discard(copy.id)
        self.moved.append(copy)
        self.acks[direction].append(Ack(copy.id, ok, copy.num_tokens, 0.0, 0.0))
        return True

    def poll(self) -> list[Ack]:
        acks = [ack for queue in self.acks.values() for ack in queue]
        for queue in self.acks.values():
            queue.clear()
        return acks

    def close(self) -> None:
        pass


class OpenTable(RequestTable):
    """A request gets its row when it is first asked for."""

    def ref(self, req: str) -> RowRef:
        return super().ref(req) if req in self else self.add(req)


class FakeTiers:
    """A manager over a FakeDevice, driven as the core drives it, `depth` steps deep."""

    def __init__(
        self,
        num_blocks: int = 17,
        num_host_blocks: int = 65,
        block_size: int = 4,
        depth: int = 1,
        honour_after: bool = True,
        **options,
    ) -> None:
        options.setdefault("store_chunk_tokens", block_size)
        self.device_pool = BlockPool(num_blocks)
        self.host_pool = BlockPool(num_host_blocks) if num_host_blocks else None
        self.table = OpenTable()
        self.kv = KVCacheManager(
            self.table, self.device_pool, block_size, 8 * block_size, self.host_pool, options=OffloadOptions(**options)
        )
        self.device = FakeDevice(num_blocks, num_host_blocks or 2, block_size, honour_after)
        self.depth = depth
        self.next_step = StepId(0)
        self.wrong: list[str] = []
        self.resumed: list[str] = []
        self.kv.begin_step(self.next_step)

    def state(self, req: str) -> KVState:
        return self.kv.view(req).state

    def step(self, tokens: dict[str, int], order=(), budget: int = 0) -> list[str]:
        """Plan and launch a step that computes n tokens each. Returns the requests that had blocks."""
        seqs = []
        for req, n in tokens.items():
            start = self.kv.view(req).num_tokens
            if self.kv.extend(req, n, start + n) is not None:
                seqs.append((req, start, n, self.kv.view(req).blocks))
        self.device.submit(self.kv.plan_stores(list(order), budget))
        if seqs:
            self.device.launch(self.next_step, seqs)
            self.next_step = StepId(self.next_step + 1)
        while len(self.device.steps) >= self.depth:
            self.wrong += self.device.run_step()
        self.kv.begin_step(self.next_step)
        return [req for req, *_ in seqs]

    def preempt(self, req: str) -> list[Copy]:
        copies = self.kv.preempt(req)
        self.device.submit(copies)
        return copies

    def resume(self, req: str, max_blocks: int = 1000) -> list[Copy]:
        copies = self.kv.resume(req, max_blocks)
        self.device.submit(copies)
        return copies

    def cancel(self) -> None:
        self.kv.cancelled(self.device.cancel(self.kv.take_withdrawn()))

    def ack(self, direction: Direction) -> bool:
        """Deliver a direction's first acknowledgement."""
        if not self.device.acks[direction]:
            return False
        req = self.kv.ack(self.device.acks[direction].popleft())
        if req is not None:
            self.resumed.append(req)
        return True

    def drain(self) -> None:
        """Let everything that is under way end."""
        self.cancel()
        while self.device.steps:
            self.wrong += self.device.run_step()
        busy = True
        while busy:
            busy = sum(self.device.move(direction) for direction in Direction) > 0
            busy = sum(self.ack(direction) for direction in Direction) > 0 or busy
        assert not self.device.pending, "copies wait for each other"

    def intact(self, req: str) -> bool:
        """True if a request in state DEVICE reads back what it wrote."""
        view = self.kv.view(req)
        return self.device.holds(req, view.num_tokens, view.blocks)

    def all_free(self) -> bool:
        host_free = self.host_pool is None or self.host_pool.num_free == self.host_pool.num_blocks - 1
        return self.device_pool.num_free == self.device_pool.num_blocks - 1 and host_free

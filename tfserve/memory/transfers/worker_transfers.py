"""WorkerTransfers: the TransferEngine of a CPU device, a thread per direction that copies with numpy. Torch-free.

numpy, because a torch copy in a thread of its own would start a second OpenMP team beside the model's.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from tfserve.errors import EngineDeadError, failures
from tfserve.memory.transfers.copy_runs import take_run
from tfserve.plan import Ack, Clock, Copy, CopyId, Direction, StepId

logger = logging.getLogger(__name__)

_MAX_RUN_BYTES = 4 * 1024 * 1024
"""Adjacent blocks are moved in one go up to this size: large enough to stream, small enough to be acknowledged soon."""


@dataclass(frozen=True, slots=True)
class TierArrays:
    """One tier's memory seen in two ways; views, strided or not, of any item type of the right size.

    `blocks` is `[num_blocks, ...]`, for whole blocks. `keys` and `values` are `[num_blocks, block_size, ...]`, for
    token ranges.
    """

    blocks: npt.NDArray[np.generic]
    keys: npt.NDArray[np.generic]
    values: npt.NDArray[np.generic]

    @classmethod
    def from_pages(cls, pages: npt.NDArray[np.generic], kv_heads: int, head_dim: int) -> Self:
        """Views of `[num_blocks, layers, 2, page]`, a page being as KVOrder.LAYER_MAJOR says: tokens last in K.

        The host tier's array is of that shape; a device tensor has the axes `[layers, 2, num_blocks, page]` to permute.
        """
        num_blocks, layers, _, page = pages.shape
        block_size = page // (kv_heads * head_dim)
        keys = pages[:, :, 0].reshape(num_blocks, layers, kv_heads, head_dim, block_size)
        values = pages[:, :, 1].reshape(num_blocks, layers, kv_heads, block_size, head_dim)
        # Splitting one axis always gives a view, so what is written here reaches the pages.
        return cls(pages, np.moveaxis(keys, 4, 1), np.moveaxis(values, 3, 1))


class WorkerTransfers:
    """Copies token ranges of blocks between two tiers in RAM, first in first out in each direction.

    `clock` gives the acknowledgements' times and is notified when there are some. `emulated_bytes_per_s` slows a
    direction down to that bandwidth, to stand in for a slower link. A copy that fails is acknowledged as such; where a
    thread ends, `poll` raises EngineDeadError, for no copy would be acknowledged any more.
    """

    def __init__(
        self,
        device: TierArrays,
        host: TierArrays,
        clock: Clock,
        *,
        emulated_bytes_per_s: Mapping[Direction, float] | None = None,
    ) -> None:
        if device.blocks.shape[1:] != host.blocks.shape[1:] or device.blocks.dtype != host.blocks.dtype:
            raise ValueError(f"the tiers' blocks differ: {device.blocks.shape[1:]} and {host.blocks.shape[1:]}")
        self._device = device
        self._host = host
        self._block_size = host.keys.shape[1]
        self._token_bytes = host.blocks[0].nbytes // self._block_size
        self._clock = clock
        self._emulated = emulated_bytes_per_s or {}
        # Guards everything below; waited on by the workers.
        self._changed = threading.Condition()
        self._queues: dict[Direction, deque[Copy]] = {direction: deque() for direction in Direction}
        self._pending: set[CopyId] = set()
        self._acks: list[Ack] = []
        self._passed = -1
        self._broken: BaseException | None = None
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, args=(direction,), name=f"kv-{direction.value}", daemon=True)
            for direction in Direction
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, copies: Sequence[Copy]) -> None:
        """Queue copies."""
        if not copies:
            return
        with self._changed:
            self._pending.update(copy.id for copy in copies)
            for copy in copies:
                self._queues[copy.direction].append(copy)
            self._changed.notify_all()

    def complete(self, step: StepId) -> None:
        """Step `step`, and all before it, have finished."""
        with self._changed:
            self._passed = max(self._passed, step)
            self._changed.notify_all()

    def poll(self) -> list[Ack]:
        """Acknowledgements since the last call."""
        with self._changed:
            if self._broken is not None:
                raise EngineDeadError(f"a thread that copies KV has ended: {self._broken!r}") from self._broken
            acks, self._acks = self._acks, []
        return acks

    def cancel(self, ids: set[CopyId]) -> set[CopyId]:
        """Drop copies that have not started; returns which."""
        gone: set[CopyId] = set()
        with self._changed:
            for queue in self._queues.values():
                gone |= {copy.id for copy in queue if copy.id in ids}
                kept = [copy for copy in queue if copy.id not in ids]
                queue.clear()
                queue.extend(kept)
            self._pending -= gone
            self._changed.notify_all()
        return gone

    def close(self) -> None:
        """Drop what has not started, finish the rest and end the threads."""
        with self._changed:
            self._closed.set()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self, direction: Direction) -> None:
        try:
            self._move_all(direction)
        except BaseException as error:
            logger.exception("the thread of %s copies has ended", direction.value)
            self._broken = error
            self._clock.notify()

    def _move_all(self, direction: Direction) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed.is_set() or self._head_ready(direction))
                if self._closed.is_set():
                    return
                run = self._take_run(self._queues[direction])
            acks = self._move(run)
            with self._changed:
                self._pending.difference_update(copy.id for copy in run)
                self._acks += acks
                self._changed.notify_all()
            self._clock.notify()

    def _head_ready(self, direction: Direction) -> bool:
        queue = self._queues[direction]
        return bool(queue) and self._ready(queue[0])

    def _ready(self, copy: Copy) -> bool:
        after = copy.after
        step_has_passed = after.step is None or after.step <= self._passed
        return step_has_passed and self._pending.isdisjoint(after.copies)

    def _take_run(self, queue: deque[Copy]) -> list[Copy]:
        """The head of the queue, and those after it that continue it on both tiers and may start too."""
        most = max(1, _MAX_RUN_BYTES // (queue[0].num_tokens * self._token_bytes))
        return take_run(queue, self._ready, most=most, blocks_per_chunk=len(self._host.blocks))

    def _move(self, run: list[Copy]) -> list[Ack]:
        first, n = run[0], len(run)
        start_s = self._clock.now()
        try:
            self._copy(first, n)
        except failures():  # whatever went wrong, the manager must learn that these copies have ended
            logger.exception("copy %s of %d blocks failed", first, n)
            now_s = self._clock.now()
            return [Ack(copy.id, False, 0, start_s, now_s) for copy in run]
        self._pace(first.direction, n * first.num_tokens * self._token_bytes, start_s)
        share_s = (self._clock.now() - start_s) / n
        return [
            Ack(copy.id, True, copy.num_tokens * self._token_bytes, start_s + i * share_s, start_s + (i + 1) * share_s)
            for i, copy in enumerate(run)
        ]

    def _copy(self, first: Copy, n: int) -> None:
        """Move the tokens of `first`, and the same ones of the n - 1 blocks beside it."""
        source, target = (
            (self._device, self._host) if first.direction is Direction.STORE else (self._host, self._device)
        )
        src, dst = (
            (first.device_block, first.host_block)
            if first.direction is Direction.STORE
            else (first.host_block, first.device_block)
        )
        if first.num_tokens == self._block_size:
            np.copyto(target.blocks[dst : dst + n], source.blocks[src : src + n])
            return
        tokens = slice(first.start, first.start + first.num_tokens)
        np.copyto(target.keys[dst : dst + n, tokens], source.keys[src : src + n, tokens])
        np.copyto(target.values[dst : dst + n, tokens], source.values[src : src + n, tokens])

    def _pace(self, direction: Direction, nbytes: int, start_s: float) -> None:
        """Sleep as long as an emulated link would still be busy."""
        bandwidth = self._emulated.get(direction)
        if bandwidth is not None:
            self._closed.wait(max(0.0, start_s + nbytes / bandwidth - self._clock.now()))

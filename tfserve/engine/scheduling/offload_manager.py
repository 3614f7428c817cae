"""OffloadManager: keeps the order of evictions and loads between the Scheduler's decisions and the link. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from tfserve.engine.scheduling.cost_model import CostModel
from tfserve.memory.kv_manager import KVCacheManager
from tfserve.memory.residency import KVState
from tfserve.plan import Copy, CopyId, Direction, StepId, StepPlan, TransferEngine
from tfserve.types import RequestId


class OffloadManager:
    """Asks the KV manager for copies, hands them to the link in an order in which none waits for a later one, and
    takes its acknowledgements. It picks no victims and frees no blocks.

    `transfers` is None without a host tier: then what is preempted is computed again. `bytes_moved` and `busy_s` are
    what the link has done so far.
    """

    def __init__(self, kv: KVCacheManager, cost: CostModel, transfers: TransferEngine | None) -> None:
        if (transfers is None) != (kv.num_host_blocks == 0):
            raise ValueError("a host tier needs transfers, and transfers a host tier")
        self._kv = kv
        self._cost = cost
        self._transfers = transfers
        self._token_bytes = cost.kv_bytes_per_token
        self._stores: list[Copy] = []
        self._loads: list[Copy] = []
        self._under_way: dict[CopyId, Copy] = {}
        self.bytes_moved = dict.fromkeys(Direction, 0)
        self.busy_s = dict.fromkeys(Direction, 0.0)

    @property
    def enabled(self) -> bool:
        """True if there is a host tier."""
        return self._transfers is not None

    @property
    def is_busy(self) -> bool:
        """True while a copy has not ended: an acknowledgement will come."""
        return bool(self._under_way or self._stores or self._loads)

    def poll(self) -> tuple[list[RequestId], bool]:
        """Take acknowledgements: requests whose resume has ended with them, and whether a copy has failed.

        After a failure any request may have less KV than before.
        """
        if self._transfers is None:
            return [], False
        ended: list[RequestId] = []
        failed = False
        for ack in self._transfers.poll():
            copy = self._under_way.pop(ack.id)
            if ack.ok:
                self._cost.observe_copy(copy.direction, ack)
                self.bytes_moved[copy.direction] += ack.nbytes
                self.busy_s[copy.direction] += ack.end_s - ack.start_s
            else:
                self._cost.observe_cancel(copy.direction, self._bytes(copy))
                failed = True
            req = self._kv.ack(ack)
            if req is not None:
                ended.append(req)
        return ended, failed

    def cancel_withdrawn(self) -> None:
        """Cancel copies that are no longer needed and have not started. Before anything is planned for a step."""
        withdrawn = self._kv.take_withdrawn()
        if not withdrawn or self._transfers is None:
            return
        cancelled = self._transfers.cancel(withdrawn)
        for copy_id in cancelled:
            copy = self._under_way.pop(copy_id)
            self._cost.observe_cancel(copy.direction, self._bytes(copy))
        self._kv.cancelled(cancelled)

    def preempt(self, req: RequestId) -> None:
        """Pause a request that runs or is on its way back; `kv.view(req)` says what is left of it."""
        self._stores += self._kv.preempt(req)

    def resume(self, req: RequestId, max_blocks: int) -> None:
        """Bring a paused request back as far as `max_blocks` more blocks allow; call again while it is PARTIAL."""
        if self._kv.view(req).state is not KVState.LOADING:
            self._loads += self._kv.resume(req, max_blocks)

    def write_through(self, order: Sequence[RequestId], predicted_s: float | None) -> None:
        """Store what running requests have written, as much as the link moves in `predicted_s` (None: all of it)."""
        if self._transfers is None:
            return
        if predicted_s is None:
            budget = self._kv.num_blocks * self._kv.block_size
        else:
            budget = int(predicted_s * self._cost.bandwidth(Direction.STORE) / self._token_bytes)
            budget -= self._kv.num_queued_tokens(Direction.STORE)
        self._stores += self._kv.plan_stores(order, budget)

    def take(self) -> tuple[tuple[Copy, ...], tuple[Copy, ...]]:
        """The stores and loads planned since the last call, for the coming step's plan."""
        copies = tuple(self._stores), tuple(self._loads)
        self._stores, self._loads = [], []
        for copy in (*copies[0], *copies[1]):
            self._under_way[copy.id] = copy
            self._cost.observe_submit(copy.direction, self._bytes(copy))
        return copies

    def submit(self, plan: StepPlan) -> None:
        """Hand a plan's copies to the link: stores first, for loads may wait for them."""
        if self._transfers is not None and (plan.stores or plan.loads):
            self._transfers.submit([*plan.stores, *plan.loads])

    def complete(self, step: StepId) -> None:
        """A step has ended, well or badly: copies that waited for it may start."""
        if self._transfers is not None:
            self._transfers.complete(step)

    def close(self) -> None:
        """End the link."""
        if self._transfers is not None:
            self._transfers.close()

    def _bytes(self, copy: Copy) -> int:
        return copy.num_tokens * self._token_bytes

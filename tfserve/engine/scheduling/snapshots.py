"""Snapshots: brings the reader state and the KV counters of all live requests together for a policy. Torch-free."""

from __future__ import annotations

import numpy as np

from tfserve.engine.scheduling.cost_model import CostModel
from tfserve.engine.scheduling.policy import MemoryView, Snapshot
from tfserve.engine.scheduling.tracker import Tracker
from tfserve.memory.kv_manager import KVCacheManager


class Snapshots:
    """Builds a Snapshot per step. Nothing loops over requests: only who got or lost its KV is looked up."""

    def __init__(
        self, kv: KVCacheManager, tracker: Tracker, cost: CostModel, *, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        self._kv = kv
        self._tracker = tracker
        self._cost = cost
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens

    def take(self, now_s: float) -> Snapshot:
        """The state at `now_s`; use it before the next event, its arrays may be views."""
        self._refresh()
        kv = self._kv
        memory = MemoryView(
            kv.block_size,
            kv.num_blocks - 1,
            kv.num_free_blocks,
            max(kv.num_host_blocks - 1, 0),
            kv.num_free_host_blocks,
        )
        return Snapshot(
            now_s=now_s,
            columns=self._tracker.columns(now_s),
            memory=memory,
            cost=self._cost,
            max_num_seqs=self._max_num_seqs,
            max_num_batched_tokens=self._max_num_batched_tokens,
        )

    def check(self) -> None:
        """Raise AssertionError unless the columns are what looking every request up gives."""
        self._refresh()
        columns = self._tracker.columns(0.0)
        fresh = self._kv.columns(columns.ids)
        for name, kept, looked_up in (
            ("num_computed", columns.num_computed, fresh.num_tokens),
            ("device_blocks", columns.device_blocks, fresh.num_device_blocks),
            ("host_tokens", columns.host_tokens, fresh.num_host_tokens),
        ):
            wrong = np.flatnonzero(kept != looked_up)
            if len(wrong):
                raise AssertionError(f"{name} of {columns.ids_of(wrong)} is not what the memory manager says")

    def _refresh(self) -> None:
        self._tracker.follow_kv(self._kv.take_moved())
        kv = self._kv.columns_at(self._tracker.kv_rows)
        self._tracker.set_kv(
            num_computed=kv.num_tokens, device_blocks=kv.num_device_blocks, host_tokens=kv.num_host_tokens
        )

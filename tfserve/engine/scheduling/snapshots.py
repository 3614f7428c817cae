"""Snapshots: the request table, the memory and the costs, put before a policy. Torch-free."""

from __future__ import annotations

from tfserve.engine.scheduling.cost_model import CostModel
from tfserve.engine.scheduling.policy import MemoryView, Snapshot
from tfserve.engine.scheduling.tracker import Tracker
from tfserve.memory.kv_manager import KVCacheManager


class Snapshots:
    """Builds a Snapshot per step. Nothing loops over requests: columns are views of the request table."""

    def __init__(
        self, kv: KVCacheManager, tracker: Tracker, cost: CostModel, *, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        self._kv = kv
        self._tracker = tracker
        self._cost = cost
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens

    def take(self, now_s: float) -> Snapshot:
        """The state at `now_s`. Decide on it before anything is carried out: its arrays are views."""
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

"""Andes: a knapsack of expected QoE gain per token of context (Liu et al., arXiv 2404.16283)."""

from __future__ import annotations

import numpy as np

from tfserve.arrays import Floats, Mask, RowIndex
from tfserve.config import SchedulerConfig
from tfserve.engine.scheduling.policies.registry import register
from tfserve.engine.scheduling.policies.sharing import RankedPolicy, Sizes, fill, stream_speed
from tfserve.engine.scheduling.policy import Snapshot

_TTFT_S = 1.0
"""When the ideal delivery curve of a request starts, after its arrival (the paper's expected TTFT)."""

_HORIZON_S = 5.0
"""How far ahead QoE is predicted; the paper finds any horizon of some seconds to do."""

_MAX_PREEMPTIONS = 1.0
"""Per request, on average (the paper's cap)."""


@register("andes", ignores=("priority",))
class Andes(RankedPolicy):
    """Serves the requests whose quality of experience gains most per token of KV; preemption gives the KV up."""

    offload = False

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self._default_rate = config.default_rate

    def rank(self, snapshot: Snapshot, sizes: Sizes) -> RowIndex:
        """By QoE gain per token; once the preemptions are used up, residents come first whatever they gain."""
        c = snapshot.columns
        served = _qoe(snapshot, self._default_rate, np.ones(len(c), np.bool_))
        waiting = _qoe(snapshot, self._default_rate, np.zeros(len(c), np.bool_))
        priority = (served - waiting) / np.maximum(c.num_tokens, 1)
        order = np.lexsort((c.seq, -priority))
        order = order[~c.is_loading[order]]
        resident = c.is_running[order]
        left_out = order[resident & ~np.isin(order, fill(order, sizes))]
        if c.total_preemptions + len(left_out) > _MAX_PREEMPTIONS * c.num_added:
            return np.concatenate([order[resident], order[~resident]])
        return order


@register("andes-offload", pauses=True, ignores=("priority",))
class AndesOffload(Andes):
    """Andes on the two-tier memory: preemption keeps the KV on the host."""

    offload = True


def _qoe(snapshot: Snapshot, default_rate: float, served: Mask) -> Floats:
    """QoE = 1 - S_delay / S_whole of each request at the end of the horizon, served until then or not.

    S_whole is the area under the ideal delivery curve, S_delay what the reader's own curve lacks of it.
    """
    c = snapshot.columns
    rate = np.where(~c.has_reader, default_rate, c.rate)
    unread = np.minimum(c.unread, c.num_output)
    more = served * stream_speed(snapshot) * _HORIZON_S
    read = np.minimum(rate * _HORIZON_S, unread + more)
    # Served, tokens are read as they come; otherwise at the reader's rate until none is left.
    late = np.where(served, read / 2, read * read / (2 * rate * _HORIZON_S))
    area = c.read_area + (c.consumed + read - late) * _HORIZON_S
    ideal_s = np.maximum(snapshot.now_s + _HORIZON_S - c.arrival_s - _TTFT_S, 0.0)
    whole = rate * ideal_s**2 / 2
    quality: Floats = np.clip(area / np.maximum(whole, 1e-9), 0.0, 1.0)
    return quality

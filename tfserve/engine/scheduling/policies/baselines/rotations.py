"""Time sharing without tokenflow's judgement, to tell apart what sharing and what buffer-awareness brings."""

from __future__ import annotations

import numpy as np

from tfserve.arrays import RowIndex
from tfserve.engine.scheduling.policies.registry import register
from tfserve.engine.scheduling.policies.sharing import RankedPolicy, Sizes
from tfserve.engine.scheduling.policy import Snapshot


@register("round-robin", pauses=True)
class RoundRobin(RankedPolicy):
    """Every request in turn: the longest off the device comes, the longest on it leaves; blind to buffers."""

    def rank(self, snapshot: Snapshot, sizes: Sizes) -> RowIndex:  # noqa: ARG002 - Andes looks at them
        """Unfinished prompts keep their place; then requests off the device, then residents, latest first."""
        c = snapshot.columns
        running = c.is_running
        turn = np.where(running, np.where(snapshot.is_decoding, 2, 0), 1)
        since = np.where(running, -c.state_since_s, c.state_since_s)
        order = np.lexsort((c.seq, since, turn))
        return order[~c.is_loading[order]]


@register("earliest-underflow", pauses=True, ignores=("priority",))
class EarliestUnderflow(RankedPolicy):
    """Smallest buffer in seconds first, nothing else; no first token yet is an empty buffer."""

    def rank(self, snapshot: Snapshot, sizes: Sizes) -> RowIndex:  # noqa: ARG002 - Andes looks at them
        """By time to empty, then by arrival; one that thinks has no first token yet."""
        c = snapshot.columns
        order = np.lexsort((c.seq, np.where(c.thinks & c.has_reader, 0.0, c.time_to_empty_s)))
        return order[~c.is_loading[order]]

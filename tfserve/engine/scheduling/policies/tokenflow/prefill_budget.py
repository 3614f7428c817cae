"""Who gets prompt tokens in the coming step, and how many, so that readers go on reading meanwhile."""

from __future__ import annotations

import numpy as np

from tfserve.arrays import Floats, RowIndex
from tfserve.config import SchedulerConfig
from tfserve.engine.scheduling.policy import Snapshot, held_back

_WORTH = 5.0
"""Prompts take this many times as long as it takes a step to have any, at least."""

_SAFETY = 0.9
"""Share of the tightest buffer that a step may last: predictions err."""


def pending_tokens(snapshot: Snapshot) -> int:
    """Tokens that requests on the device must compute before they can decode."""
    c = snapshot.columns
    return int(np.dot(c.num_uncomputed, c.is_running & ~snapshot.is_decoding))


def prefill_order(snapshot: Snapshot, headroom: Floats) -> RowIndex:
    """Running requests with tokens to compute: first tokens in order of urgency, then recomputes."""
    c = snapshot.columns
    rows = np.flatnonzero(c.is_running & ~snapshot.is_decoding)
    return rows[np.lexsort((c.seq[rows], headroom[rows], c.num_output[rows] > 0))]


class PrefillBudget:
    """How many prompt tokens each step takes, so that readers go on reading meanwhile.

    A step may last until the tightest decoding reader has stalled, in all, by `stall_budget_per_wait` of the longest
    wait for a first token on the device (`low_buffer_s` at most). At least `min_prefill_share` of the time goes to
    prompts, so that first tokens come even when readers cannot all be kept going. Where a step takes long for having
    prompts at all, they come in chunks that are worth it, and the steps between only decode; `_owed_s` is the prompts'
    share of those.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._owed_s = 0.0

    def rest(self) -> None:
        """No prompts are on the device: nothing is owed to those to come."""
        self._owed_s = 0.0

    def tokens(self, snapshot: Snapshot, headroom: Floats) -> int | None:
        """Most prompt tokens for the coming step; None if no reader depends on it."""
        c, config = snapshot.columns, self._config
        decoding = snapshot.is_decoding
        readers = decoding & c.is_read
        prompts = c.is_running & ~decoding
        if not readers.any() or not prompts.any():
            self._owed_s = 0.0
            return None
        decoding = decoding & ~held_back(c, config.generate_ahead_s)
        cost = snapshot.cost
        token_s = max(cost.prefill_s_per_token, 1e-12)
        decode_s = cost.step_s(int(np.count_nonzero(decoding)), float(c.num_tokens[decoding].sum()))
        wait_s = -float(headroom[prompts & ~c.has_started].min(initial=0.0))
        excused_s = min(config.tokenflow.stall_budget_per_wait * wait_s, config.tokenflow.low_buffer_s)
        tightest_s = c.time_to_empty_s[readers] + np.maximum(excused_s - c.stall_s[readers], 0.0)
        slack_s = _SAFETY * float(tightest_s.min()) - decode_s
        self._owed_s += decode_s * config.tokenflow.min_prefill_share / (1 - config.tokenflow.min_prefill_share)
        num_tokens = int((max(slack_s, self._owed_s) - cost.prompts_s) / token_s)
        worth = int(min(_WORTH * cost.prompts_s / token_s, pending_tokens(snapshot), snapshot.max_num_batched_tokens))
        if num_tokens < worth:
            if (readers & decoding).any():
                return 0
            # Held back, readers go on reading, but no decode would fill the step.
            num_tokens = worth
        self._owed_s = 0.0
        return min(max(num_tokens, 1), snapshot.max_num_batched_tokens)

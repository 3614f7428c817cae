"""Who gets prompt tokens in the coming step, and how many, so that readers go on reading meanwhile."""

from __future__ import annotations

import numpy as np

from tfserve.config import SchedulerConfig
from tfserve.engine.policy import Snapshot
from tfserve.engine.table import Rows
from tfserve.engine.token_buffer import Floats

_SAFETY = 0.9
"""Share of the tightest buffer that a step may last: predictions err."""


def pending_tokens(snapshot: Snapshot) -> int:
    """Tokens that requests on the device must compute before they can decode."""
    c = snapshot.columns
    return int(np.dot(c.num_uncomputed, c.is_running & ~snapshot.is_decoding))


def prefill_order(snapshot: Snapshot, headroom: Floats) -> Rows:
    """Running requests with tokens to compute: first tokens in order of urgency, then those that recompute."""
    c = snapshot.columns
    rows = np.flatnonzero(c.is_running & ~snapshot.is_decoding)
    return rows[np.lexsort((c.seq[rows], headroom[rows], c.num_output[rows] > 0))]


def prefill_tokens(snapshot: Snapshot, headroom: Floats, config: SchedulerConfig) -> int | None:
    """Most prompt tokens for the coming step; None if nobody's reading depends on it.

    The step may last until the tightest decoding reader has stalled, in all, by `stall_per_wait` of the longest wait
    for a first token on the device (`critical_s` at most); but at least `min_prefill_share` of it goes to prompts, so
    that first tokens come even when readers cannot all be kept going.
    """
    c = snapshot.columns
    decoding = snapshot.is_decoding
    readers = decoding & c.has_reader
    prompts = c.is_running & ~decoding
    if not readers.any() or not prompts.any():
        return None
    token_s = max(snapshot.cost.prefill_s_per_token, 1e-12)
    decode_s = snapshot.cost.step_s(int(np.count_nonzero(decoding)), float(c.num_tokens[decoding].sum()))
    wait_s = -float(headroom[prompts & ~c.has_started].min(initial=0.0))
    excused_s = min(config.stall_per_wait * wait_s, config.critical_s)
    tightest_s = c.time_to_empty_s[readers] + np.maximum(excused_s - c.stall_s[readers], 0.0)
    slack_s = _SAFETY * float(tightest_s.min()) - decode_s
    fair_s = decode_s * config.min_prefill_share / (1 - config.min_prefill_share)
    return min(max(int(max(slack_s, fair_s) / token_s), 1), snapshot.max_num_batched_tokens)

"""Counted rates: a rate far beyond what one stream gets of a full device counts as that. Torch-free.

Such a request cannot be promised its rate beside others. Taken at its word it would seem to be in want for ever, and
keep others off the device. It is treated as a reader of what it can get.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tfserve.engine.scheduling.policy import Snapshot

_AT_ITS_WORD = 2.0
"""Rates up to this many times what one stream gets are believed: a few such readers can be fed beside slower ones."""


def stream_share(snapshot: Snapshot, default_rate: float) -> float:
    """Tokens/s of one stream when the device is full of requests of the present ones' average length.

    At least `default_rate`: the rate that answers are taken to be read at is taken at its word on any device.
    """
    c, memory = snapshot.columns, snapshot.memory
    mean_ctx = max(float((c.num_prompt + c.expected_output / 2).sum()) / len(c), 1.0)
    batch = max(1.0, min(snapshot.max_num_seqs, memory.num_blocks * memory.block_size / mean_ctx))
    return max(default_rate, 1.0 / snapshot.cost.step_s(batch, batch * mean_ctx))


def as_counted(snapshot: Snapshot, share: float) -> Snapshot:
    """The snapshot as if requests of rates far beyond `share` were read at `share` tokens/s since their first token.

    What such a request lacked while it was on the device is forgiven: only time off the device leaves it in want. Its
    reports do not count. What it named above that makes no difference.
    """
    c = snapshot.columns
    with np.errstate(invalid="ignore"):
        is_over = c.rate > _AT_ITS_WORD * share
    if not is_over.any():
        return snapshot
    reading, first_s = c.reading, c.first_token_s
    away_s = np.where(c.is_running, 0.0, c.now_s - c.state_since_s)
    lacked_s = c.now_s - first_s - reading.generated / share
    since_s = first_s + np.maximum(lacked_s - away_s, 0.0)
    # Before the first token nothing is read.
    since_s = np.where(np.isnan(first_s), np.inf, since_s)
    counted = reading._replace(
        consumed=np.where(is_over, 0.0, reading.consumed),
        since_s=np.where(is_over, since_s, reading.since_s),
        stall_s=np.where(is_over, 0.0, reading.stall_s),
        read_area=np.where(is_over, 0.0, reading.read_area),
    )
    return replace(snapshot, columns=replace(c, rate=np.where(is_over, share, c.rate), reading=counted))


def as_unread(snapshot: Snapshot) -> Snapshot:
    """The snapshot as if requests had no reader while they think (docs/decisions/018-thoughts-have-no-reader.md)."""
    c = snapshot.columns
    if not c.thinks.any():
        return snapshot
    return replace(snapshot, columns=replace(c, rate=np.where(c.thinks, np.nan, c.rate)))

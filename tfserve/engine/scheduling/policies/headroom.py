"""How urgently a request needs the device, and what running it is worth (docs/scheduling.md)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tfserve.arrays import Floats
from tfserve.config import SchedulerConfig
from tfserve.engine.scheduling.columns import Columns
from tfserve.engine.scheduling.qos import TAU_FULL, TAU_ZERO

_WELL_AHEAD = 0.125
"""Unread share of the output from which on another token has lost a quarter of its value. In simulation, 0.15 means
fewer stalls (H200 a: 1.3 instead of 1.5 %) and 3 % less effective throughput than 0.1."""

_MAX_EXPONENT = 60.0
_MIN_SHARE = 0.1
"""A switch longer than the interval is judged by what follows it, not by the nothing that is left of the interval."""


def headroom_s(columns: Columns, now_s: float, background_slack_s: float) -> Floats:
    """Seconds until a request is in want; negative: for how long it has been.

    A reader's playback left, less its present stall. Before any output, less the time since arrival, so that the queue
    is first come first served. Without a reader, and while it thinks, a constant less the time off the device: it
    counts as a request with that much to read, and in the end comes to its turn.
    """
    c = columns
    reading = np.where(c.has_started, c.time_to_empty_s - c.current_stall_s, c.arrival_s - now_s)
    if c.is_read.all():
        return reading
    away = c.is_waiting | c.is_paused
    background = background_slack_s - np.where(away, now_s - c.state_since_s, 0.0)
    return np.where(~c.is_read, background, reading)


def gain(
    config: SchedulerConfig,
    *,
    unread: npt.NDArray[Any],
    headroom: Floats,
    rate: Floats,
    expected_output: Floats,
    overhead_s: Floats,
    speed: float,
) -> Floats:
    """What running a request over idling it for one interval is worth, in tokens of one stream's interval; elementwise.

    gain = v t' + w (phi(b if idle) - phi(b if run)), phi(b) = exp(-b / (r buffer_scale_s)): v is the value of a
    token at the buffer left after the switch of `overhead_s`, t' the share of the interval left then, `speed` tokens/s
    what a running stream gets. It falls with the buffer, because phi goes on below an empty one, past 1.
    """
    interval = config.schedule_interval_s
    left = np.maximum(interval - overhead_s, _MIN_SHARE * interval)
    reads = ~np.isnan(rate)
    with np.errstate(invalid="ignore"):
        after = np.maximum(unread - rate * overhead_s, 0.0)
        ahead_s = np.where(reads, left * speed / rate, left)
    length = np.maximum(expected_output, 1.0)
    value = (TAU_ZERO - after / length) / (TAU_ZERO - TAU_FULL)
    value = np.minimum(np.maximum(value, 0.0), 1.0)
    idle = np.exp(np.minimum((interval - headroom) / config.tokenflow.buffer_scale_s, _MAX_EXPONENT))
    penalty = idle * (1.0 - np.exp(ahead_s / -config.tokenflow.buffer_scale_s))
    return np.where(reads, value, 0.0) * (left / interval) + config.tokenflow.underflow_weight * penalty


def loss_order(
    gains: Floats,
    *,
    unread: npt.NDArray[Any],
    rate: Floats,
    num_output: npt.NDArray[Any],
    expected_output: Floats,
    min_unread_s: Floats,
) -> Floats:
    """Who loses least by leaving the device, ascending; elementwise, of residents' gains. Only its order has a meaning.

    First requests without a reader; then requests well ahead (over `_WELL_AHEAD` of the output and `min_unread_s`
    unread), shortest remaining reading time first; then the others, least gain first. What the device makes beyond all
    reading is worth nothing to any reader: it goes to the few requests that have most to come, and they are done
    sooner.
    """
    reads = ~np.isnan(rate)
    rate = np.where(reads, rate, 1.0)
    left_s = (unread + np.maximum(expected_output - num_output, 0.0)) / rate
    is_ahead = (unread > _WELL_AHEAD * expected_output) & (unread > min_unread_s * rate)
    order = np.where(is_ahead, left_s / (1.0 + left_s) - 2.0, gains)
    return np.where(reads, order, gains - 4.0)

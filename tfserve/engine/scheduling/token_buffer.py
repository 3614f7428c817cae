"""The virtual token buffer: what has been generated and not yet read, computed from timestamps. Torch-free.

As in the TokenFlow paper. Reading starts with the first token and runs at the reader's rate while there is something
unread; an empty buffer stalls it until the next token. Everything is a function of the last event and the time since,
so no timer runs. The functions work on arrays, one element per request.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import UnsetType

from tfserve.arrays import Floats
from tfserve.errors import RequestError
from tfserve.types import FASTEST_RATE, SLOWEST_RATE, ConsumptionRate

NAMED_RATES = {"listen": 4.0, "read": 6.0, "fast": 12.0}
"""Tokens/s of the names a request may use for its rate; "auto" starts at the default and follows feedback."""

AUTO = "auto"

_SLOWEST = 0.5
"""Least estimated rate, tokens/s: a reader who put the page away is not a reader without end."""

_NEWS_WEIGHT = 0.5
"""How far one report moves the estimated rate."""


def resolve_rate(rate: float | str | None, default: float) -> float:
    """Tokens/s that `consumption_rate` asks for; NaN for None (no reader). Raises RequestError for anything else."""
    if rate is None:
        return math.nan
    if isinstance(rate, str):
        if rate == AUTO:
            return default
        if rate in NAMED_RATES:
            return NAMED_RATES[rate]
    elif isinstance(rate, int | float) and not isinstance(rate, bool) and SLOWEST_RATE <= rate <= FASTEST_RATE:
        return float(rate)
    names = ", ".join(repr(name) for name in (*NAMED_RATES, AUTO))
    bounds = f"{SLOWEST_RATE} to {FASTEST_RATE:.0f} tokens/s"
    shown = rate[:100] if isinstance(rate, str) else rate
    raise RequestError("consumption_rate", f"consumption_rate must be {bounds}, or {names}, got {shown!r}")


def exceeds(rate: ConsumptionRate | UnsetType, most: float) -> bool:
    """True if a request with this `consumption_rate` asks for more than `most` tokens/s, and for a rate at all."""
    asked = NAMED_RATES.get(rate) if isinstance(rate, str) else rate
    return isinstance(asked, int | float) and most < asked <= FASTEST_RATE


@dataclass(frozen=True)
class Playback:
    """Where readers are at one moment. Tokens and seconds; a request without a rate reads everything at once.

    `current_stall_s` is how long the present stall has lasted, `stall_s` all stalls together. `read_area` is the
    integral of `consumed` over time, token seconds: how far the reader has been along, for how long. The last two are
    computed when they are asked for, from what there was at the last event (`before`) and since (`elapsed`, `read` in
    `reading_s`).
    """

    consumed: Floats
    current_stall_s: Floats
    before: tuple[Floats, Floats, Floats]
    """Consumed, stall seconds, read area."""
    elapsed: Floats
    read: Floats
    reading_s: Floats

    @cached_property
    def stall_s(self) -> Floats:
        """All stalls together."""
        return self.before[1] + self.current_stall_s

    @cached_property
    def read_area(self) -> Floats:
        """The integral of `consumed`."""
        consumed, _, area = self.before
        return area + consumed * self.elapsed + self.read * (0.5 * self.reading_s + self.current_stall_s)


def play(
    now_s: float,
    *,
    rate: Floats,
    generated: npt.NDArray[Any],
    consumed: Floats,
    since_s: Floats,
    stall_s: Floats,
    read_area: Floats,
) -> Playback:
    """Let readers go on from `since_s` (inf: not started) to `now_s`; nothing is generated in between."""
    elapsed = np.maximum(now_s - since_s, 0.0)
    unread = generated - consumed
    with np.errstate(invalid="ignore"):
        read = np.fmin(unread, rate * elapsed)
        reading_s = read / rate
    has_rate = rate > 0
    reading_s = np.where(has_rate, reading_s, elapsed)
    # What a division rounds away must not count as a stall.
    current_stall_s = np.where(has_rate & (read >= unread), np.maximum(elapsed - reading_s, 0.0), 0.0)
    return Playback(consumed + read, current_stall_s, (consumed, stall_s, read_area), elapsed, read, reading_s)


def estimated_rate(rate: float, tokens: float, seconds: float, most: float) -> float:
    """A reader's rate after a report of `tokens` read in `seconds` without a stall; `most` is what can be believed."""
    measured = max(min(tokens / seconds, most), _SLOWEST)
    return rate + _NEWS_WEIGHT * (measured - rate)

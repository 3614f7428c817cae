"""RequestState: where a request is between its arrival and its end. Torch-free."""

from __future__ import annotations

import enum


class RequestState(enum.IntEnum):
    """WAITING has no batch slot and no KV, RUNNING has both, FINISHED has neither and is in no table any more.

    PAUSED and LOADING have KV but no batch slot. PAUSED: on the host, perhaps some of it still on the device. LOADING:
    on its way back, device blocks reserved.
    """

    WAITING = 0
    RUNNING = 1
    PAUSED = 2
    LOADING = 3
    FINISHED = 4

"""Two hundred made-up streams: the states that an engine reports during a burst, without a model."""

from __future__ import annotations

import time

from tests.http.fakes import FakeEngine
from tfserve.config import EngineConfig
from tfserve.types import EngineStats, StreamState

PHASES = ("running",) * 48 + ("paused",) * 60 + ("loading",) * 12 + ("waiting",) * 80
NUM_STREAMS = len(PHASES)
DRY = 5
"""The first so many of the running streams have nothing to read."""

TOKENS_PER_S = 2.0
"""Tokens/s of each stream but the waiting ones: tokens for 120 streams, of which 60 streams are in time."""


class CrowdEngine(FakeEngine):
    """A FakeEngine that shows a crowd beside its real streams; by the wall's clock, so that speeds are known."""

    def __init__(self, config: EngineConfig, reply: str | None = None, step_s: float = 0.0) -> None:
        super().__init__(config, reply, step_s)
        self._begun_s = time.time()

    async def streams(self) -> list[StreamState]:
        return [self._state(number) for number in range(NUM_STREAMS)] + await super().streams()

    def stats(self) -> EngineStats:
        count = {phase: PHASES.count(phase) for phase in ("waiting", "running", "paused", "loading")}
        return EngineStats(
            now_s=10.0,
            step=7,
            num_waiting=count["waiting"],
            num_running=count["running"],
            num_paused=count["paused"],
            num_loading=count["loading"],
            num_blocks=1001,
            num_free_blocks=50,
            num_host_blocks=4001,
            num_free_host_blocks=2400,
            block_size=32,
            num_preemptions=137,
            num_prompt_tokens=4000,
            num_output_tokens=sum(self._num_output(number) for number in range(NUM_STREAMS)),
            num_finished=0,
        )

    def _num_output(self, number: int) -> int:
        if PHASES[number] == "waiting":
            return 0
        # Not all at the same moment.
        return int(20 + TOKENS_PER_S * (time.time() - self._begun_s) + (number * 7 % NUM_STREAMS) / NUM_STREAMS)

    def _state(self, number: int) -> StreamState:
        phase = PHASES[number]
        has_begun = phase != "waiting"
        # A paused stream is far ahead; the others are within a tenth of their answer.
        unread = {"running": float(number % 7) + 2, "paused": 44.0 + number % 17, "loading": 1.5, "waiting": 0.0}[phase]
        if number < DRY:
            unread = 0.0
        rate = (4.0, 6.0, 12.0)[number % 3]
        return StreamState(
            id=f"chatcmpl-crowd{number}-0",
            phase=phase,
            age_s=20.0 - number / 10,
            num_prompt_tokens=50,
            num_output_tokens=self._num_output(number),
            max_tokens=100,
            rate=rate,
            num_unread=unread,
            time_to_empty_s=unread / rate if has_begun else None,
            stall_s=0.0,
            ttft_s=0.5 if has_begun else None,
            num_preemptions=number % 3,
        )

"""CudaStreamRunner: runs another runner's steps on their own CUDA stream and times them by events."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import torch

from tfserve.plan import InFlight, Runner, StepId, StepPlan, StepResult


class CudaStreamRunner:
    """A plan.Runner around another runner, which does not deal with CUDA streams.

    `stream` is the current stream while `inner` launches. `on_launched`, if set, is called with each step's number and
    its end event: copies wait for that event on the device.
    """

    def __init__(self, inner: Runner, stream: torch.cuda.Stream) -> None:
        self.on_launched: Callable[[StepId, torch.cuda.Event], None] | None = None
        self.stream = stream
        self._inner = inner
        self._last_end: torch.cuda.Event | None = None
        # Weights and KV were created on the default stream.
        torch.cuda.synchronize(stream.device)

    def launch(self, plan: StepPlan) -> InFlight:
        """Start a step."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self.stream):
            begin.record()
            flight = self._inner.launch(plan)
            end.record()
        if self.on_launched is not None:
            self.on_launched(plan.step, end)
        before, self._last_end = self._last_end, end
        return TimedFlight(flight, before, begin, end)

    def close(self) -> None:
        """Wait for what is on the stream."""
        self.stream.synchronize()


class TimedFlight:
    """A launched step, timed by its two events; `before` is the end event of the previous step."""

    def __init__(
        self, inner: InFlight, before: torch.cuda.Event | None, begin: torch.cuda.Event, end: torch.cuda.Event
    ) -> None:
        self._inner = inner
        self._before, self._begin, self._end = before, begin, end

    def result(self) -> StepResult:
        """The step's outcome; waits for the device."""
        result = self._inner.result()
        self._end.synchronize()
        idle_s = 0.0 if self._before is None else self._before.elapsed_time(self._begin) / 1e3
        device_s = self._begin.elapsed_time(self._end) / 1e3
        return msgspec.structs.replace(result, device_s=device_s, idle_s=idle_s)

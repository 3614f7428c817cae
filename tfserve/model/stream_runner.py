"""StreamRunner: a runner's steps on a CUDA stream of their own, timed by the device."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import torch

from tfserve.plan import Fence, InFlight, Runner, StepPlan, StepResult


class StreamRunner:
    """plan.Runner around another one, which knows nothing of streams.

    `stream` becomes the current one while `inner` works. `on_launched`, once set, is told of each step's number and of
    the event that ends it: copies wait for that event on the device.
    """

    def __init__(self, inner: Runner, stream: torch.cuda.Stream) -> None:
        self.on_launched: Callable[[Fence, torch.cuda.Event], None] | None = None
        self.stream = stream
        self._inner = inner
        # Weights and KV were made on the default stream.
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
        return TimedFlight(flight, begin, end, self.stream)

    def close(self) -> None:
        """Wait for what is on the stream."""
        self.stream.synchronize()


class TimedFlight:
    """A launched step whose time is that between two events."""

    def __init__(
        self, inner: InFlight, begin: torch.cuda.Event, end: torch.cuda.Event, stream: torch.cuda.Stream
    ) -> None:
        self._inner = inner
        self._begin, self._end = begin, end
        self._stream = stream

    @property
    def fence(self) -> Fence:
        """The step's number."""
        return self._inner.fence

    def ready(self) -> bool:
        """True once the device has reached the step's end."""
        return self._inner.ready() and self._end.query()

    def result(self) -> StepResult:
        """The step's outcome; waits for the device."""
        with torch.cuda.stream(self._stream):
            result = self._inner.result()
        self._end.synchronize()
        return msgspec.structs.replace(result, device_s=self._begin.elapsed_time(self._end) / 1e3)

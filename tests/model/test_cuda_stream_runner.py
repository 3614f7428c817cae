"""A step's time and the idle time before it, by the events around it."""

from __future__ import annotations

from dataclasses import dataclass

from tfserve.model.cuda_stream_runner import TimedFlight
from tfserve.plan import Fence, StepResult


@dataclass
class Flight:
    fence = Fence(7)
    over: bool = False

    def ready(self) -> bool:
        return self.over

    def result(self) -> StepResult:
        return StepResult(self.fence, (5,), (None,), device_s=9.0, idle_s=9.0)


@dataclass
class Event:
    """An event at a time in milliseconds, reached after a wait for it."""

    at_ms: float
    reached: bool = False

    def query(self) -> bool:
        return self.reached

    def synchronize(self) -> None:
        self.reached = True

    def elapsed_time(self, end: Event) -> float:
        assert end.reached or self.at_ms >= end.at_ms - 100
        return end.at_ms - self.at_ms


def test_times_are_the_devices() -> None:
    first, second = (Event(10.0), Event(15.0)), (Event(15.5), Event(21.5))
    results = [
        TimedFlight(Flight(), before, *events).result() for before, events in ((None, first), (first[1], second))
    ]
    assert [(result.device_s, result.idle_s) for result in results] == [(0.005, 0.0), (0.006, 0.0005)]
    assert results[1].tokens == (5,)


def test_it_is_over_when_the_device_is_and_its_tokens_are_here() -> None:
    inner, end = Flight(), Event(2.0)
    flight = TimedFlight(inner, None, Event(1.0), end)
    assert flight.fence == 7
    assert not flight.ready()
    end.reached = True
    assert not flight.ready()
    inner.over = True
    assert flight.ready()

"""Requests with a grammar are scheduled once it is compiled, and nothing else waits for that."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.engine.fakes import FakeEngine, expected_output
from tfserve.engine.scheduling.grammar_gate import GrammarGate
from tfserve.messages import AbortRequest, ListStreams, ReportPlayed, Shutdown, StreamStates
from tfserve.plan import Clock
from tfserve.types import FinishReason, Tenant


class FakeGrammars:
    """Compiles a grammar when the test says so; `problems` are the invalid ones."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.held: set[str] = set()
        self.problems: dict[str, str] = {}
        self._go: dict[str, threading.Event] = {}
        self.closed = threading.Event()

    def event(self, grammar: str) -> threading.Event:
        return self._go.setdefault(grammar, threading.Event())

    def hold(self, grammar: str) -> bool:
        return grammar in self.held

    def compile(self, grammar: str) -> str:
        self.begun.append(grammar)
        self.event(grammar).wait(30)
        if problem := self.problems.get(grammar):
            return problem
        self.held.add(grammar)
        return ""

    def let_go(self, grammar: str) -> None:
        self.held.discard(grammar)


class Gated(FakeEngine):
    """The fake engine with a gate of fake grammars."""

    def __init__(self, grammars: FakeGrammars, max_held: int = 8, pipeline_depth: int = 1, **settings: object) -> None:
        self.pipeline_depth = pipeline_depth
        self.grammars = grammars

        def gate(clock: Clock) -> GrammarGate:
            return GrammarGate(grammars, clock, max_held=max_held, compile_limit_s=5.0)

        super().__init__(gate=gate, **settings)

    def until(self, condition: Callable[[], bool]) -> None:
        """Turn the loop until something is so; the threads that compile are real ones."""
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline
            if not self.step():
                time.sleep(0.001)

    def end(self, *reqs: str) -> list[FinishReason]:
        """Turn the loop until these have ended; how they did."""
        self.until(lambda: set(reqs) <= self.finished.keys())
        return [self.finished[req].finish_reason for req in reqs]

    def compile(self, *grammars: str) -> None:
        """Let these be compiled."""
        for grammar in grammars:
            self.grammars.event(grammar).set()


@pytest.fixture
def grammars() -> Iterator[FakeGrammars]:
    grammars = FakeGrammars()
    yield grammars
    for event in list(grammars._go.values()):
        event.set()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_request_begins_when_its_grammar_is_compiled_and_others_do_not_wait(
    grammars: FakeGrammars, depth: int
) -> None:
    engine = Gated(grammars, pipeline_depth=depth)
    engine.add("json", [1, 2, 3], 5, grammar="g")
    engine.add("text", [4, 5], 5)
    assert engine.end("text") == [FinishReason.LENGTH]
    assert (engine.outputs["json"], engine.core.stats().num_waiting) == ([], 1)
    engine.compile("g")
    assert engine.end("json") == [FinishReason.LENGTH]
    assert engine.outputs["json"] == expected_output([1, 2, 3], 5)
    assert engine.all_free()
    assert not grammars.held


def test_a_grammar_is_compiled_once_for_all_its_requests(grammars: FakeGrammars) -> None:
    engine = Gated(grammars)
    for number in range(3):
        engine.add(f"r{number}", [number + 1], 3, grammar="g")
    engine.add("other", [7], 3, grammar="h")
    engine.step()
    engine.compile("g", "h")
    engine.end("r0", "r1", "r2", "other")
    engine.add("late", [9], 3, grammar="g")
    engine.end("late")
    assert grammars.begun == ["g", "h", "g"]  # let go of, and not kept by this fake


def test_a_grammar_stays_held_while_a_request_has_it(grammars: FakeGrammars) -> None:
    engine = Gated(grammars)
    engine.compile("g")
    engine.add("short", [1], 2, grammar="g")
    engine.add("long", [2], 40, grammar="g")
    engine.end("short")
    assert grammars.held == {"g"}
    engine.end("long")
    assert not grammars.held


def test_abort_while_compiling_ends_the_request_at_once(grammars: FakeGrammars) -> None:
    engine = Gated(grammars)
    for req in ("a", "b"):
        engine.add(req, [1, 2], 3, grammar="g")
    engine.step()
    engine.core.inbox.put(AbortRequest("a"))
    assert engine.end("a") == [FinishReason.ABORT]
    engine.core.inbox.put(AbortRequest("b"))
    engine.end("b")
    engine.add("c", [1, 2], 3, grammar="h")
    engine.compile("g", "h")
    assert engine.end("c") == [FinishReason.LENGTH]
    assert not grammars.held
    assert engine.all_free()


def test_shutdown_while_compiling_ends_every_request(grammars: FakeGrammars) -> None:
    engine = Gated(grammars)
    engine.add("json", [1, 2], 3, grammar="g")
    engine.add("queued", [1, 2], 3, grammar="h")
    engine.step()
    engine.core.inbox.put(Shutdown())
    engine.core.run()
    assert {output.finish_reason for output in engine.finished.values()} == {FinishReason.ABORT}
    engine.compile("g")
    engine.core.close()
    assert grammars.begun == ["g"]


def test_a_grammar_that_cannot_be_compiled_fails_its_requests_only(grammars: FakeGrammars) -> None:
    grammars.problems["bad"] = "too complex"
    engine = Gated(grammars)
    for req, grammar in (("a", "bad"), ("b", "bad"), ("c", "good")):
        engine.add(req, [1, 2], 3, grammar=grammar)
    engine.compile("bad", "good")
    assert engine.end("a", "b", "c") == [FinishReason.ERROR, FinishReason.ERROR, FinishReason.LENGTH]
    assert "too complex" in engine.finished["a"].error
    assert engine.finished["a"].recurs
    assert grammars.begun == ["bad", "good"]


def test_one_that_takes_too_long_fails_and_the_next_is_compiled(grammars: FakeGrammars) -> None:
    engine = Gated(grammars)
    engine.add("slow", [1, 2], 3, grammar="slow")
    engine.add("good", [1, 2], 3, grammar="good")
    engine.step()
    engine.compile("good")
    engine.core.sleep()  # until the limit
    assert engine.end("slow", "good") == [FinishReason.ERROR, FinishReason.LENGTH]
    # It is still being compiled: no second thread begins on it.
    engine.add("again", [1, 2], 3, grammar="slow")
    assert engine.end("again") == [FinishReason.ERROR]
    engine.compile("slow")
    engine.until(lambda: "slow" in grammars.held)
    engine.add("after", [1, 2], 3, grammar="good")
    engine.end("after")
    engine.add("at last", [1, 2], 3, grammar="slow")
    assert engine.end("at last") == [FinishReason.LENGTH]
    assert not grammars.held


def test_threads_that_never_end_are_few(grammars: FakeGrammars) -> None:
    engine = Gated(grammars)
    for number in range(6):
        engine.add(f"r{number}", [1, 2], 3, grammar=f"g{number}")
    engine.step()
    while len(engine.finished) < 6:
        engine.clock.time += 6.0
        engine.step()
    assert len(grammars.begun) == 2
    assert {output.finish_reason for output in engine.finished.values()} == {FinishReason.ERROR}


def test_no_more_grammars_are_held_than_there_may_be(grammars: FakeGrammars) -> None:
    engine = Gated(grammars, max_held=1)
    engine.compile("g", "h")
    engine.add("first", [1, 2], 6, grammar="g")
    engine.add("second", [1, 2], 6, grammar="h")
    engine.until(lambda: bool(engine.outputs["first"]))
    assert grammars.begun == ["g"]
    assert engine.end("first", "second") == [FinishReason.LENGTH] * 2
    assert grammars.begun == ["g", "h"]


def test_grammars_held_for_long_bar_no_other_tenant(grammars: FakeGrammars) -> None:
    engine = Gated(grammars, max_held=2)
    for number in range(4):
        engine.add(f"many{number}", [number + 1], 60, grammar=f"g{number}", tenant=Tenant("many"))
    engine.compile("g0", "g1", "g2", "g3", "h", "i")
    engine.until(lambda: grammars.held == {"g0", "g1"})
    engine.add("one", [7], 3, grammar="h", tenant=Tenant("one"))
    assert engine.end("one") == [FinishReason.LENGTH]
    assert grammars.held == {"g0", "g1"}
    assert engine.core.stats().num_waiting == 2
    engine.run()
    assert engine.all_free()
    assert not grammars.held


def test_the_next_grammar_is_that_of_the_tenant_with_the_fewest(grammars: FakeGrammars) -> None:
    engine = Gated(grammars)
    for number in range(4):
        engine.add(f"many{number}", [number + 1], 60, grammar=f"g{number}", tenant=Tenant("many"))
    engine.until(lambda: grammars.begun == ["g0"])
    engine.add("one", [7], 3, grammar="h", tenant=Tenant("one"))
    engine.compile("g0", "g1", "g2", "g3", "h")
    engine.end("one", "many0", "many1", "many2", "many3")
    assert grammars.begun == ["g0", "h", "g1", "g2", "g3"]


def test_a_request_that_waits_for_its_grammar_is_listed_and_may_be_reported_on(grammars: FakeGrammars) -> None:
    engine = Gated(grammars)
    engine.add("json", [1, 2], 3, rate=6.0, grammar="g")
    engine.add("text", [1, 2], 30)
    engine.step()
    engine.core.inbox.put(ReportPlayed("json", 1))
    engine.core.inbox.put(ListStreams(1))
    engine.step()
    (states,) = [message for message in engine.messages if isinstance(message, StreamStates)]
    first = states.streams[0]
    assert (first.id, first.phase, first.rate) == ("json", "waiting", 6.0)
    assert len(states.streams) == 2
    engine.compile("g")
    assert engine.end("json", "text") == [FinishReason.LENGTH] * 2

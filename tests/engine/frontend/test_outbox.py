"""Messages for an engine that does not read: aborts wait in order, other messages are refused, no caller blocks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import pytest

from tfserve.engine.frontend.outbox import Outbox
from tfserve.errors import EngineDeadError, EngineStalledError

PATIENCE_S = 10.0
LARGE = b"x" * 2**20


@pytest.fixture
def pipe() -> Iterator[tuple[Outbox, Connection]]:
    """An outbox with room for four large frames, and the other end, which does not read by itself."""
    near, far = Pipe()
    outbox = Outbox(near, max_bytes=4 * len(LARGE))
    yield outbox, far
    far.close()
    outbox.close(PATIENCE_S)
    near.close()


def fill(outbox: Outbox, frame: bytes = LARGE) -> int:
    """Put frames until there is no room; how many."""
    for count in range(100_000):
        try:
            outbox.put_in_turn(frame, 0.0)
        except EngineStalledError:
            return count
    raise AssertionError("an outbox without end")


def test_unread_frames_are_refused_and_accepted_ones_arrive_in_order(
    pipe: tuple[Outbox, Connection],
) -> None:
    outbox, far = pipe
    num_taken = fill(outbox)
    assert num_taken == 4
    assert outbox.is_full
    with pytest.raises(EngineStalledError, match="4 MiB"):
        outbox.put_in_turn(b"small", 0.0)
    outbox.put(b"an end")
    assert [far.recv_bytes() for _ in range(num_taken + 1)] == [LARGE] * num_taken + [b"an end"]
    outbox.put_in_turn(b"news", PATIENCE_S)
    assert far.recv_bytes() == b"news"
    assert not outbox.is_full


def test_small_frames_are_bounded_too(pipe: tuple[Outbox, Connection]) -> None:
    outbox, _ = pipe
    outbox.put(LARGE)  # what the kernel has no room for
    assert fill(outbox, b"") > 1000
    assert outbox.is_full


def test_a_caller_with_patience_waits_until_there_is_room(pipe: tuple[Outbox, Connection]) -> None:
    outbox, far = pipe
    num_taken = fill(outbox)
    waiting = threading.Thread(target=outbox.put_in_turn, args=(b"last", None))
    waiting.start()
    assert [far.recv_bytes() for _ in range(num_taken + 1)][-1] == b"last"
    waiting.join(PATIENCE_S)
    assert not waiting.is_alive()


def test_a_waiting_caller_gets_an_error_when_the_other_end_closes(pipe: tuple[Outbox, Connection]) -> None:
    outbox, far = pipe
    fill(outbox)
    told: list[type[Exception]] = []

    def wait() -> None:
        try:
            outbox.put_in_turn(b"last", None)
        except EngineDeadError as error:
            told.append(type(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    far.close()
    waiting.join(PATIENCE_S)
    assert told == [EngineDeadError]
    with pytest.raises(EngineDeadError):
        outbox.put(b"an end")

"""StreamTransfers over streams that run in any order: what is enqueued when, and that no order corrupts anything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.copy_queues import acknowledged
from tests.memory.transfers.fake_link import FakeLink
from tfserve.engine.core.clock import RealClock
from tfserve.errors import EngineDeadError
from tfserve.memory.transfers.copy_runs import BlockGeometry
from tfserve.memory.transfers.stream_transfers import StreamTransfers
from tfserve.plan import Ack, BlockId, Copy, CopyDeps, CopyId, Direction, StepId

STORE, LOAD = Direction.STORE, Direction.LOAD
GEOMETRY = BlockGeometry(pages=2, block_size=4, row_bytes=1)
NUM_BLOCKS = 9
PATIENCE_S = 10.0


def copy(
    number: int, direction: Direction, device_block: int, host_block: int, start=0, num_tokens=4, step=None, copies=()
) -> Copy:
    after = CopyDeps(None if step is None else StepId(step), tuple(CopyId(c) for c in copies))
    return Copy(CopyId(number), direction, BlockId(device_block), BlockId(host_block), start, num_tokens, after)


class Bench:
    """A StreamTransfers with its fake device; memory is one array of bytes per tier."""

    def __init__(self, honour_after: bool = True, chunk: int = 100) -> None:
        self.device = np.zeros((NUM_BLOCKS, GEOMETRY.pages, 4), np.uint8)
        self.host = np.zeros((NUM_BLOCKS, GEOMETRY.pages, 4), np.uint8)
        self.link = FakeLink(self.device.reshape(-1), self.host.reshape(-1), honour_after)
        self.engine = StreamTransfers(self.link, GEOMETRY, chunk, RealClock())

    def enqueued(self) -> int:
        return sum(len(self.link.streams[direction]) for direction in Direction)

    def settle(self, n: int) -> list[Ack]:
        """Run the device, and take n acknowledgements."""
        self.link.run_all()
        return acknowledged(self.engine, n, PATIENCE_S)


@pytest.fixture
def bench():
    bench = Bench()
    yield bench
    bench.link.run_all()
    bench.engine.close()


def test_a_copy_that_waits_for_nothing_is_on_the_device_at_once_and_acknowledged_when_it_has_run(bench):
    bench.device[1:3] = 7
    bench.engine.submit([copy(0, STORE, 1, 5), copy(1, STORE, 2, 6)])
    assert bench.enqueued() == 1  # neighbours, in one copy
    assert bench.engine.poll() == []
    acks = bench.settle(2)
    assert [(ack.id, ack.ok, ack.nbytes) for ack in acks] == [(0, True, 8), (1, True, 8)]
    assert all(ack.start_s <= ack.end_s for ack in acks)
    assert (bench.host[5:7] == 7).all()


def test_a_step_that_is_running_is_waited_for_on_the_device(bench):
    bench.engine.submit([copy(0, STORE, 1, 1, step=3)])
    assert bench.enqueued() == 0  # step 3 is not launched yet
    mark = bench.link.launch(lambda: bench.device.__setitem__(1, 9))
    bench.engine.launched(StepId(3), mark)
    assert bench.enqueued() == 1
    assert STORE not in bench.link.ready()
    bench.settle(1)
    assert (bench.host[1] == 9).all()


def test_a_step_that_is_over_is_not_waited_for(bench):
    bench.engine.complete(StepId(3))
    bench.engine.submit([copy(0, STORE, 1, 1, step=3)])
    assert bench.link.ready() == [STORE]


def test_completion_of_a_later_step_frees_what_waited_for_one_that_was_never_launched(bench):
    bench.engine.submit([copy(0, STORE, 1, 1, step=3)])
    bench.engine.complete(StepId(4))
    assert bench.enqueued() == 1


def test_a_load_into_a_block_that_is_being_stored_waits_on_the_device(bench):
    bench.device[1], bench.host[2] = 5, 6
    bench.engine.submit([copy(0, STORE, 1, 1), copy(1, LOAD, 1, 2, copies=[0])])
    assert bench.enqueued() == 2
    assert bench.link.ready() == [STORE]
    bench.settle(2)
    assert (bench.host[1] == 5).all()
    assert (bench.device[1] == 6).all()


def test_a_load_behind_a_store_that_is_held_is_held_too_and_follows_it(bench):
    bench.engine.submit([copy(0, STORE, 1, 1, step=0), copy(1, LOAD, 1, 2, copies=[0])])
    assert bench.enqueued() == 0
    bench.engine.launched(StepId(0), bench.link.launch(lambda: None))
    assert bench.enqueued() == 2
    assert sorted(ack.id for ack in bench.settle(2)) == [0, 1]


def test_directions_do_not_hold_each_other_up_but_order_holds_within_one(bench):
    bench.engine.submit([copy(0, STORE, 1, 1, step=0), copy(1, STORE, 2, 2), copy(2, LOAD, 3, 3)])
    assert [ack.id for ack in bench.settle(1)] == [2]
    bench.engine.complete(StepId(0))
    assert [ack.id for ack in bench.settle(2)] == [0, 1]


def test_what_is_on_the_device_cannot_be_cancelled_and_what_is_held_can(bench):
    bench.engine.submit([copy(0, STORE, 5, 5), copy(1, STORE, 1, 1, step=0), copy(2, LOAD, 1, 3, copies=[1])])
    assert bench.engine.cancel({CopyId(0), CopyId(1), CopyId(9)}) == {1}
    assert sorted(ack.id for ack in bench.settle(2)) == [0, 2]
    assert bench.engine.cancel({CopyId(2)}) == set()


def test_a_run_does_not_wait_for_more_than_its_first_copy(bench):
    mark = bench.link.launch(lambda: None)
    bench.engine.launched(StepId(0), mark)
    bench.engine.submit([copy(0, LOAD, 1, 1), copy(1, LOAD, 2, 2), copy(2, LOAD, 3, 3, step=0)])
    bench.link.run(LOAD)
    assert bench.link.moved[0][1].nbytes == 16
    assert LOAD not in bench.link.ready()
    bench.settle(3)


def test_runs_end_where_registered_memory_does():
    bench = Bench(chunk=3)
    bench.engine.submit([copy(i, STORE, i + 1, i + 1) for i in range(6)])
    assert bench.enqueued() == 3  # host blocks 1-2, 3-5 and 6
    bench.settle(6)
    bench.engine.close()


def test_a_copy_that_the_device_fails_is_acknowledged_as_failed_and_the_next_one_runs(bench, caplog):
    bench.host.flags.writeable = False
    bench.link.host = bench.host.reshape(-1)
    bench.engine.submit([copy(0, STORE, 1, 1)])
    assert [(ack.id, ack.ok, ack.nbytes) for ack in bench.settle(1)] == [(0, False, 0)]
    bench.link.refuse = True
    bench.engine.submit([copy(1, STORE, 1, 1)])
    assert [(ack.id, ack.ok) for ack in bench.settle(1)] == [(1, False)]
    bench.link.refuse = False
    bench.engine.submit([copy(2, LOAD, 1, 1, copies=[0, 1])])
    assert [(ack.id, ack.ok) for ack in bench.settle(1)] == [(2, True)]
    assert "failed" in caplog.text
    assert "could not be started" in caplog.text


def test_the_end_of_a_thread_reaches_the_loop(bench):
    def move(*_):
        raise SystemExit("ended")

    bench.link._move = move
    bench.engine.submit([copy(0, STORE, 1, 1)])
    bench.link.run_all()
    bench.engine._clock.wait(None)
    with pytest.raises(EngineDeadError, match="ended"):
        bench.engine.poll()


def test_closing_drops_what_is_held_and_lets_go_of_the_link(bench):
    engine = bench.engine
    engine.submit([copy(0, STORE, 1, 1, step=9)])
    engine.close()
    assert bench.link.closed
    assert not any(thread.is_alive() for thread in engine._threads)
    bench.engine = Bench().engine  # the fixture closes one too


class Race:
    """Steps write and read blocks while they are stored, given away and loaded into; every order of the streams.

    Block 1 is written by step 0, stored, given to a load that waits for the store and for step 1, its last reader.
    """

    def __init__(self, honour_after: bool) -> None:
        self.bench = bench = Bench(honour_after)
        self.read: int | None = None
        bench.host[2] = 20
        bench.engine.submit(
            [copy(0, STORE, 1, 1, step=0), copy(1, LOAD, 1, 2, step=1, copies=[0])],
        )
        bench.engine.launched(StepId(0), bench.link.launch(lambda: bench.device.__setitem__(1, 10)))
        bench.engine.launched(StepId(1), bench.link.launch(self._read))

    def _read(self) -> None:
        self.read = int(self.bench.device[1, 0, 0])

    def play(self, order) -> bool:
        """Run streams as `order` prefers them; whether every byte is what it should be."""
        link = self.bench.link
        while ready := link.ready():
            link.run(next(name for name in order if name in ready))
        intact = (self.bench.host[1] == 10).all() and self.read == 10 and (self.bench.device[1] == 20).all()
        self.bench.engine.close()
        return bool(intact)


ORDERS = list(itertools.permutations(["compute", STORE, LOAD]))


@pytest.mark.parametrize("order", ORDERS)
def test_no_order_of_the_streams_corrupts_anything(order):
    assert Race(honour_after=True).play(order)


def test_without_the_marks_some_order_would():
    assert not all(Race(honour_after=False).play(order) for order in ORDERS)
    assert not Race(honour_after=False).play([STORE, "compute", LOAD])  # a store before the step that writes
    assert not Race(honour_after=False).play([LOAD, "compute", STORE])  # a load before the last reader

"""What every TransferEngine does, whatever moves its bytes; and what the CPU's worker threads do beside."""

from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pytest

from tests.memory.fakes import FakeDevice
from tests.memory.transfers.fake_link import FakeLink
from tests.panics import PanicException
from tfserve.engine.core.clock import RealClock
from tfserve.engine.simulation.clock import SimClock
from tfserve.engine.simulation.transfers import SimLinks, SimTransfers
from tfserve.errors import EngineDeadError
from tfserve.memory.transfers.copy_runs import BlockGeometry
from tfserve.memory.transfers.stream_transfers import StreamTransfers
from tfserve.memory.transfers.worker_transfers import TierArrays, WorkerTransfers
from tfserve.plan import Ack, BlockId, Copy, CopyDeps, CopyId, Direction, StepId

STORE, LOAD = Direction.STORE, Direction.LOAD
LAYERS, BLOCK, HEADS, WIDTH = 3, 4, 2, 8
PAGE = BLOCK * HEADS * WIDTH
TOKEN_BYTES = LAYERS * 2 * HEADS * WIDTH * 4
PATIENCE_S = 10.0


def copy(
    number: int, direction: Direction, device_block: int, host_block: int, start=0, num_tokens=4, step=None, copies=()
) -> Copy:
    after = CopyDeps(None if step is None else StepId(step), tuple(CopyId(c) for c in copies))
    return Copy(CopyId(number), direction, BlockId(device_block), BlockId(host_block), start, num_tokens, after)


class WorkerBench:
    """The worker threads in real time, on a layer-major device as a CPU has it."""

    def __init__(self, **options) -> None:
        self.device = np.zeros((LAYERS, 2, 9, PAGE), np.float32)
        self.host = np.zeros((9, LAYERS, 2, PAGE), np.float32)
        device = TierArrays.from_pages(self.device.transpose(2, 0, 1, 3), HEADS, WIDTH)
        host = TierArrays.from_pages(self.host, HEADS, WIDTH)
        self.clock = RealClock()
        self.engine = WorkerTransfers(device, host, self.clock, **options)

    def settle(self, n: int) -> list[Ack]:
        """Wait for n acknowledgements, and a little for more than those."""
        acks: list[Ack] = []
        deadline = time.monotonic() + PATIENCE_S
        while len(acks) < n and time.monotonic() < deadline:
            self.clock.wait(self.clock.now() + 0.05)
            acks += self.engine.poll()
        self.clock.wait(self.clock.now() + 0.02)
        return acks + self.engine.poll()


class SimBench:
    """The simulated links in virtual time."""

    def __init__(self) -> None:
        self.clock = SimClock()
        links = SimLinks(store_bytes_per_s=1e6, load_bytes_per_s=2e6, latency_s=1e-5)
        self.engine = SimTransfers(self.clock, links, TOKEN_BYTES)

    def settle(self, n: int) -> list[Ack]:
        acks = self.engine.poll()
        while self.clock.next_event_s is not None:
            self.clock.wait(None)
            acks += self.engine.poll()
        return acks


class FakeBench:
    """The fake of the manager's tests, which has to keep the same promises."""

    def __init__(self) -> None:
        self.engine = FakeDevice(9, 9, 4)

    def settle(self, n: int) -> list[Ack]:
        while sum(self.engine.move(direction) for direction in Direction):
            pass
        return self.engine.poll()


class StreamBench:
    """Transfers over streams, on a device that runs one copy after another."""

    def __init__(self) -> None:
        geometry = BlockGeometry(2 * LAYERS, BLOCK, HEADS * WIDTH)
        device, host = (np.zeros(9 * geometry.block_bytes, np.uint8) for _ in range(2))
        self.link = FakeLink(device, host)
        self.engine = StreamTransfers(self.link, geometry, 100, RealClock())

    def settle(self, n: int) -> list[Ack]:
        acks: list[Ack] = []
        deadline = time.monotonic() + PATIENCE_S
        while (ready := self.link.ready()) and time.monotonic() < deadline:
            self.link.run(ready[0])
            while not (new := self.engine.poll()) and time.monotonic() < deadline:
                time.sleep(1e-3)
            acks += new
        # The copies of a run are acknowledged together.
        return acks


@pytest.fixture(params=[WorkerBench, SimBench, FakeBench, StreamBench])
def bench(request):
    bench = request.param()
    yield bench
    bench.engine.close()


def ids(acks: list[Ack]) -> list[int]:
    return [ack.id for ack in acks]


def test_copies_of_a_direction_are_acknowledged_in_order_and_once(bench):
    bench.engine.submit([copy(0, STORE, 1, 5), copy(1, STORE, 2, 6), copy(2, STORE, 7, 1, num_tokens=1)])
    acks = bench.settle(3)
    assert ids(acks) == [0, 1, 2]
    assert all(ack.ok for ack in acks)
    assert all(ack.start_s <= ack.end_s for ack in acks)
    assert all(a.end_s <= b.start_s + 1e-9 for a, b in itertools.pairwise(acks))
    assert bench.engine.poll() == []


def test_a_copy_waits_for_its_step(bench):
    bench.engine.submit([copy(0, STORE, 1, 1, step=3)])
    bench.engine.complete(StepId(2))
    assert bench.settle(0) == []
    bench.engine.complete(StepId(4))
    assert ids(bench.settle(1)) == [0]


def test_a_copy_waits_for_the_other_direction(bench):
    bench.engine.submit([copy(0, STORE, 1, 1, step=0), copy(1, LOAD, 1, 2, copies=[0])])
    assert bench.settle(0) == []
    bench.engine.complete(StepId(0))
    acks = bench.settle(2)
    assert ids(acks) == [0, 1]
    assert acks[0].end_s <= acks[1].start_s + 1e-9


def test_directions_do_not_hold_each_other_up(bench):
    bench.engine.submit([copy(0, STORE, 1, 1, step=0), copy(1, LOAD, 2, 2)])
    assert ids(bench.settle(1)) == [1]


def test_a_waiting_copy_holds_up_those_behind_it(bench):
    bench.engine.submit([copy(0, STORE, 1, 1, step=0), copy(1, STORE, 2, 2)])
    assert bench.settle(0) == []


def test_cancelled_copies_are_never_acknowledged_and_count_as_ended(bench):
    bench.engine.submit([copy(0, STORE, 1, 1, step=0), copy(1, STORE, 2, 2), copy(2, LOAD, 1, 3, copies=[0])])
    assert bench.settle(0) == []
    assert bench.engine.cancel({CopyId(0), CopyId(77)}) == {0}
    assert sorted(ids(bench.settle(2))) == [1, 2]


def test_what_has_ended_cannot_be_cancelled(bench):
    bench.engine.submit([copy(0, STORE, 1, 1)])
    bench.settle(1)
    assert bench.engine.cancel({CopyId(0)}) == set()


def test_a_copy_that_was_never_submitted_counts_as_ended(bench):
    bench.engine.submit([copy(5, LOAD, 1, 1, copies=[4])])
    assert ids(bench.settle(1)) == [5]


def by_token(pages: np.ndarray) -> np.ndarray:
    """`[blocks, tokens, everything]` of `[blocks, layers, 2, page]`, spelt out as KVOrder describes pages."""
    tokens = np.zeros((len(pages), BLOCK, LAYERS * 2 * HEADS * WIDTH), pages.dtype)
    for block, token in np.ndindex(len(pages), BLOCK):
        keys = pages[block, :, 0].reshape(LAYERS, HEADS, WIDTH, BLOCK)[..., token]
        values = pages[block, :, 1].reshape(LAYERS, HEADS, BLOCK, WIDTH)[:, :, token]
        tokens[block, token] = np.concatenate([keys.ravel(), values.ravel()])
    return tokens


def test_workers_move_just_the_tokens_named_and_merge_neighbours():
    bench = WorkerBench()
    bench.device[:] = np.random.default_rng(0).random(bench.device.shape, np.float32)
    original = by_token(bench.device.transpose(2, 0, 1, 3))
    bench.engine.submit([copy(i, STORE, 1 + i, 4 + i) for i in range(3)])
    bench.engine.submit([copy(3, STORE, 7, 8, start=1, num_tokens=2)])
    acks = bench.settle(4)
    assert [ack.nbytes for ack in acks] == [4 * TOKEN_BYTES] * 3 + [2 * TOKEN_BYTES]
    host = by_token(bench.host)
    np.testing.assert_array_equal(host[4:7], original[1:4])
    np.testing.assert_array_equal(host[8, 1:3], original[7, 1:3])
    assert not host[8, [0, 3]].any()
    assert not host[:4].any()
    bench.device[:] = 0
    bench.engine.submit([copy(10, LOAD, 2, 4), copy(11, LOAD, 3, 5), copy(12, LOAD, 1, 8, start=1, num_tokens=2)])
    bench.settle(3)
    device = by_token(bench.device.transpose(2, 0, 1, 3))
    np.testing.assert_array_equal(device[2:4], original[1:3])
    np.testing.assert_array_equal(device[1, 1:3], original[7, 1:3])
    assert not device[1, [0, 3]].any()
    assert not device[4:].any()
    bench.engine.close()


def test_workers_wake_the_sleeping_loop():
    bench = WorkerBench()
    bench.engine.submit([copy(0, STORE, 1, 1)])
    start = bench.clock.now()
    bench.clock.wait(start + PATIENCE_S)
    assert ids(bench.engine.poll()) == [0]
    assert bench.clock.now() - start < PATIENCE_S / 2
    bench.engine.close()


def test_a_copy_that_raises_is_acknowledged_as_failed_and_the_next_one_runs(caplog):
    bench = WorkerBench()
    bench.engine._host.blocks.flags.writeable = False
    bench.engine.submit([copy(0, STORE, 1, 1), copy(1, LOAD, 1, 1, copies=[0])])
    acks = bench.settle(2)
    assert [(ack.id, ack.ok, ack.nbytes) for ack in acks] == [(0, False, 0), (1, True, 4 * TOKEN_BYTES)]
    assert "failed" in caplog.text
    bench.engine.close()


class BrokenClock(RealClock):
    """A clock that breaks, where no copy is to blame."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def now(self) -> float:
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("broken"), PanicException("broken"), SystemExit("broken")], ids=repr)
def test_the_end_of_a_thread_reaches_the_loop(error):
    bench = WorkerBench()
    bench.engine._clock = BrokenClock(error)
    bench.engine.submit([copy(1, STORE, 1, 1)])
    bench.engine._clock.wait(None)
    with pytest.raises(EngineDeadError, match="broken"):
        bench.engine.poll()
    bench.engine.close()


def test_an_emulated_link_takes_its_time():
    bench = WorkerBench(emulated_bytes_per_s={STORE: 8 * TOKEN_BYTES / 0.05})
    bench.engine.submit([copy(0, STORE, 1, 1), copy(1, STORE, 2, 2), copy(2, LOAD, 5, 5)])
    acks = {ack.id: ack for ack in bench.settle(3)}
    assert acks[1].end_s - acks[0].start_s >= 0.05
    assert acks[2].end_s - acks[2].start_s < 0.05
    bench.engine.close()


def test_close_ends_the_threads_even_when_copies_still_wait():
    before = threading.active_count()
    bench = WorkerBench()
    bench.engine.submit([copy(0, STORE, 1, 1, step=9)])
    bench.engine.close()
    assert threading.active_count() == before


def test_tiers_of_different_shape_are_refused():
    one, other = (TierArrays.from_pages(np.zeros((2, layers, 2, PAGE)), HEADS, WIDTH) for layers in (1, 2))
    with pytest.raises(ValueError, match="blocks differ"):
        WorkerTransfers(one, other, RealClock())

"""CudaLink and StreamTransfers on a real device: bytes, order, overlap, and the two races with controls."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.copy_queues import acknowledged
from tfserve.engine.core.clock import RealClock
from tfserve.memory.storage.host_pool import HostPool
from tfserve.memory.transfers.copy_runs import BlockGeometry, blocks_per_chunk
from tfserve.memory.transfers.cuda_link import CudaLink
from tfserve.memory.transfers.stream_transfers import StreamTransfers
from tfserve.plan import Ack, BlockId, Copy, CopyDeps, CopyId, Direction, StepId

STORE, LOAD = Direction.STORE, Direction.LOAD
LAYERS, BLOCK, HEADS, WIDTH = 4, 256, 8, 128
GEOMETRY = BlockGeometry(2 * LAYERS, BLOCK, HEADS * WIDTH * 2)
NUM_BLOCKS = 17
PATIENCE_S = 20.0
DELAY_CYCLES = 400_000_000  # about 0.2 s of a GPU


def copy(number, direction, device_block, host_block, start=0, num_tokens=BLOCK, step=None, copies=()) -> Copy:
    after = CopyDeps(None if step is None else StepId(step), tuple(CopyId(c) for c in copies))
    return Copy(CopyId(number), direction, BlockId(device_block), BlockId(host_block), start, num_tokens, after)


class Unordered(CudaLink):
    """The control of the race tests: streams wait for nothing."""

    def start(self, direction, what, after):
        return super().start(direction, what, [])


class Bench:
    def __init__(self, link_type=CudaLink, chunk_blocks: int = 4) -> None:
        self.compute = torch.cuda.Stream()
        shape = (NUM_BLOCKS, LAYERS, 2, BLOCK, HEADS, WIDTH)
        self.device = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
        self.pool = HostPool(NUM_BLOCKS, (GEOMETRY.block_bytes,), np.uint8)
        self.pool.data[:] = 0
        self.host = torch.from_numpy(self.pool.data).view(torch.bfloat16).view(shape)
        # A kernel is loaded when it is first launched, which would wait for the step that is to be under way.
        torch.cuda._sleep(1)
        self.device[1].fill_(1).zero_()
        torch.cuda.synchronize()
        chunk = chunk_blocks * GEOMETRY.block_bytes
        self.link = link_type(self.device, self.pool.data, chunk_bytes=chunk, compute=self.compute)
        self.engine = StreamTransfers(self.link, GEOMETRY, chunk_blocks, RealClock())

    def launch(self, step: int, kernel) -> torch.cuda.Event:
        with torch.cuda.stream(self.compute):
            torch.cuda._sleep(DELAY_CYCLES)
            kernel()
            mark = torch.cuda.Event()
            mark.record()
        self.engine.launched(StepId(step), mark)
        return mark

    def settle(self, n: int) -> list[Ack]:
        return acknowledged(self.engine, n, PATIENCE_S)


@pytest.fixture
def bench():
    bench = Bench()
    yield bench
    bench.engine.close()


def test_the_streams_are_three_and_chunks_end_on_pages(bench):
    handles = {stream.cuda_stream for stream in (*bench.link._streams.values(), bench.compute)}
    assert len(handles) == 3
    assert blocks_per_chunk(GEOMETRY.block_bytes, 2**24) * GEOMETRY.block_bytes % 4096 == 0


@pytest.mark.parametrize("seed", range(4))
def test_random_copies_move_exactly_their_tokens(bench, seed):
    rng = np.random.default_rng(seed)
    bench.device.normal_()
    bench.host.copy_(torch.randn(bench.host.shape))
    torch.cuda.synchronize()
    device, host = bench.device.cpu(), bench.host.clone()
    copies = []
    # Each block takes part in one copy at most, so that order does not matter here.
    for i, (dev, hst) in enumerate(zip(rng.permutation(16) + 1, rng.permutation(16) + 1, strict=True)):
        start = int(rng.integers(0, BLOCK)) if i % 2 else 0
        num_tokens = int(rng.integers(1, BLOCK - start + 1)) if i % 2 else BLOCK
        direction = STORE if rng.random() < 0.5 else LOAD
        copies.append(copy(i, direction, int(dev), int(hst), start, num_tokens))
        source, target = (device, host) if direction is STORE else (host, device)
        src, dst = (dev, hst) if direction is STORE else (hst, dev)
        target[dst, :, :, start : start + num_tokens] = source[src, :, :, start : start + num_tokens]
    bench.engine.submit(copies)
    acks = bench.settle(len(copies))
    assert all(ack.ok and ack.end_s > ack.start_s for ack in acks)
    torch.cuda.synchronize()
    assert torch.equal(bench.device.cpu(), device)
    assert torch.equal(bench.host, host)


@pytest.mark.parametrize("block", [3, NUM_BLOCKS - 1])
@pytest.mark.parametrize("direction", list(Direction))
def test_a_copy_may_end_where_registered_memory_does(bench, direction, block):
    """A rectangle's last row is its width long, and no more: a whole pitch would pass the end of a chunk, or of all."""
    values = torch.randn(bench.host.shape).to(bench.host.dtype)
    (bench.device if direction is STORE else bench.host).copy_(values)
    torch.cuda.synchronize()
    bench.engine.submit([copy(0, direction, block, block, start=BLOCK - 1, num_tokens=1)])
    assert bench.settle(1)[0].ok
    torch.cuda.synchronize()
    target = bench.host if direction is STORE else bench.device.cpu()
    assert torch.equal(target[block, :, :, -1], values[block, :, :, -1])
    assert not target[block, :, :, :-1].any()


def test_neighbours_go_in_one_copy_over_no_border_of_registered_memory(bench):
    bench.device.normal_()
    torch.cuda.synchronize()
    bench.engine.submit([copy(i, STORE, i + 1, i + 1) for i in range(12)])
    bench.settle(12)
    assert torch.equal(bench.host[1:13], bench.device[1:13].cpu())


def test_launching_and_submitting_never_wait_for_the_device(bench):
    mark = bench.launch(0, lambda: bench.device[1].fill_(1))
    bench.engine.submit([copy(0, STORE, 1, 1, step=0), copy(1, LOAD, 1, 2, copies=[0])])
    bench.engine.poll()
    assert not mark.query()  # the step has not even ended
    bench.settle(2)


def race(link_type) -> tuple[bool, bool]:
    """Whether a store saw what the step it waits for wrote, and a step saw its block before a load replaced it."""
    bench = Bench(link_type)
    seen = torch.zeros_like(bench.device[1])
    bench.host[2] = 20
    bench.engine.submit([copy(0, STORE, 1, 1, step=0)])
    bench.launch(0, lambda: bench.device[1].fill_(10))
    stored = bench.settle(1)[0].ok and bool((bench.host[1] == 10).all())
    bench.device[3] = 10
    torch.cuda.synchronize()
    bench.engine.submit([copy(1, LOAD, 3, 2, step=1)])
    bench.launch(1, lambda: seen.copy_(bench.device[3]))
    bench.settle(1)
    torch.cuda.synchronize()
    read = bool((seen == 10).all())
    bench.engine.close()
    return stored, read


def test_no_store_starts_before_its_step_and_no_load_before_the_last_reader():
    assert race(CudaLink) == (True, True)


def test_without_the_events_both_races_are_lost():
    assert race(Unordered) == (False, False)


def test_a_load_that_waits_for_a_store_follows_it_on_the_device(bench):
    bench.device[1], bench.host[2] = 5, 6
    torch.cuda.synchronize()
    bench.engine.submit([copy(0, STORE, 1, 1), copy(1, LOAD, 1, 2, copies=[0])])
    bench.settle(2)
    assert (bench.host[1] == 5).all()
    assert (bench.device[1] == 6).all()

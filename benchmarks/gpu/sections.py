"""The sections of the GPU benchmark. Each yields results one by one, so that a timeout loses only the rest."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np

from benchmarks.gpu.rig import Rig, Shape
from benchmarks.gpu.roofline import kernels_s, operations
from tfserve.bench.roofline import floor_s
from tfserve.engine.scheduling.cost_model import CostModel, StepSample
from tfserve.engine.scheduling.table import RequestTable
from tfserve.memory.block_pool import BlockPool
from tfserve.memory.kv_manager import KVCacheManager, OffloadOptions
from tfserve.memory.residency import KVState
from tfserve.plan import BlockId, Copy, CopyDeps, CopyId, Direction, StepId

WARM_UP, REPEATS, ROOM = 3, 10, 16
"""Steps before timing, steps timed, and tokens of room that a decode cell leaves for them."""

STORE_CHUNK = 32
CONTEXT_UNDER_COPIES = 2048
PATIENCE_S = 30.0

Result = dict[str, Any]


class Ceilings(dict[str, float]):
    """The machine's measured limits."""

    def floor_s(self, shape: Shape, itemsize: int, seqs: int, new: int, context: int) -> tuple[float, float]:
        """The roofline of a step, and its FLOPs."""
        ops = operations(shape, itemsize, seqs, new, context)
        return floor_s(ops, self["copy_bytes_per_s"], self["matmul_flops_per_s"]), sum(flops for _, flops in ops)


def step_times(rig: Rig, shape: Shape, ceilings: Ceilings) -> Iterator[Result]:
    """Prefill and decode at every batch and context, beside the roofline; after each context a cost model so far."""
    timed = StepTimes(rig, shape, ceilings)
    for context in shape.contexts:
        for batch in shape.batches:
            if not assign(rig, batch, context):
                held = (rig.pool.num_blocks - 1) * rig.layout.block_size
                yield {"kind": "decode", "batch": batch, "context": context, "skipped": f"KV holds only {held} tokens"}
                continue
            if batch * context <= shape.prefill_tokens:
                yield _tried("prefill", timed.prefill, batch, context)
            else:
                reason = f"more than {shape.prefill_tokens} tokens in one step"
                yield {"kind": "prefill", "batch": batch, "context": context, "skipped": reason}
            yield _tried("decode", timed.decode, batch, context)
        if timed.samples:
            yield _simulator_profile(rig, timed.samples)


def assign(rig: Rig, batch: int, context: int) -> bool:
    """Give a batch its blocks, in shuffled order, for adjacent ones would flatter the kernels. False without room."""
    per_seq = rig.blocks_for(context + ROOM)
    need = batch * per_seq + 1
    if need > rig.pool.num_blocks:
        return False
    rig.assign(np.random.default_rng(0).permutation(np.arange(1, need)).reshape(batch, per_seq).tolist())
    return True


def _tried(kind: str, measure: Callable[[int, int], Result], batch: int, context: int) -> Result:
    """A cell, or the error of a failed one: a failure must not affect the others."""
    cell = {"kind": kind, "batch": batch, "context": context}
    try:
        return cell | measure(batch, context)
    except Exception as error:  # any error of a kernel
        return cell | {"error": f"{type(error).__name__}: {error}"}


class StepTimes:
    """Times steps of a rig's batch, beside the roofline; `samples` are all of them."""

    def __init__(self, rig: Rig, shape: Shape, ceilings: Ceilings) -> None:
        self._rig = rig
        self._shape = shape
        self._ceilings = ceilings
        self.samples: list[StepSample] = []

    def decode(self, batch: int, context: int) -> Result:
        """A token each."""
        wall_s, device_s = _timed_decodes(self._rig, context)
        two_deep_s = _two_deep_decode_s(self._rig, context)
        floor, _ = self._ceilings.floor_s(self._shape, self._rig.layout.dtype.itemsize, batch, 1, context)
        self.samples.append(StepSample(batch, float(batch * context), 0, 0.0, device_s))
        return {
            "device_ms": device_s * 1e3,
            "wall_ms": wall_s * 1e3,
            "two_deep_wall_ms": two_deep_s * 1e3,
            "roofline_ms": floor * 1e3,
            "over_roofline": device_s / floor,
            "two_deep_over_roofline": two_deep_s / floor,
        }

    def prefill(self, batch: int, context: int) -> Result:
        """Whole prompts."""
        device_s = statistics.median([self._rig.prefill(context).device_s for _ in range(4)][1:])
        floor, flops = self._ceilings.floor_s(self._shape, self._rig.layout.dtype.itemsize, batch, context, context)
        self.samples.append(StepSample(0, 0.0, batch * context, batch * context * context / 2, device_s))
        return {
            "device_ms": device_s * 1e3,
            "tokens_per_s": batch * context / device_s,
            "roofline_ms": floor * 1e3,
            "over_roofline": device_s / floor,
            "share_of_matmul_rate": flops / device_s / self._ceilings["matmul_flops_per_s"],
        }


def kernels(rig: Rig, shape: Shape) -> Iterator[Result]:
    """Which kernels the time goes to: a decode step of the smallest, a middle and the largest batch, and a prefill."""
    device, context = rig.pool.storage.device.type, shape.contexts[0]
    batches = shape.batches
    for batch in sorted({batches[0], batches[len(batches) // 2], batches[-1]}):
        if assign(rig, batch, context):
            spent = kernels_s(functools.partial(rig.decode, context), device)
            yield {"kind": "decode", "batch": batch, "context": context, "kernels_s": spent}
    if assign(rig, 1, context):
        spent = kernels_s(lambda: rig.prefill(context), device)
        yield {"kind": "prefill", "batch": 1, "context": context, "kernels_s": spent}


def _timed_decodes(rig: Rig, context: int, repeats: int = REPEATS) -> tuple[float, float]:
    """Median wall and device seconds of a decode step."""
    walls, devices = [], []
    for i in range(WARM_UP + repeats):
        began_s = time.perf_counter()
        result = rig.decode(context + min(i, ROOM - 1))
        if i >= WARM_UP:
            walls.append(time.perf_counter() - began_s)
            devices.append(result.device_s)
    return statistics.median(walls), statistics.median(devices)


def _two_deep_decode_s(rig: Rig, context: int) -> float:
    """Wall seconds per decode step where each is launched before the one before it is read."""
    flight = rig.launch_decode(context)
    began_s = time.perf_counter()
    for i in range(REPEATS):
        following = rig.launch_decode(context + min(1 + i, ROOM - 1))
        flight.result()
        flight = following
    flight.result()
    return (time.perf_counter() - began_s) / (REPEATS + 1)


def _simulator_profile(rig: Rig, samples: list[StepSample]) -> Result:
    """Coefficients of the cost model fitted to these cells, as the simulator takes them."""
    cost = CostModel(kv_bytes_per_token=rig.layout.token_bytes, max_num_seqs=rig.max_num_seqs)
    cost.calibrate(samples)
    errors = [
        abs(cost.step_s(s.n_decode, s.decode_ctx, s.n_prefill, s.prefill_ctx) - s.seconds) / s.seconds for s in samples
    ]
    return {
        "kind": "profile",
        "coefficients": msgspec.structs.asdict(cost.coefficients),
        "mean_relative_error": statistics.mean(errors),
        "kv_bytes_per_token": rig.layout.token_bytes,
    }


class Copies:
    """Submits made-up copies of a rig's blocks and waits for them."""

    def __init__(self, rig: Rig, num_blocks: int) -> None:
        self.tier = rig.host_tier(num_blocks + 1)
        self.num_blocks = num_blocks
        self._layout = rig.layout
        self._clock = rig.clock
        self._ids = itertools.count(10**9)

    def make(self, direction: Direction, start: int, num_tokens: int) -> list[Copy]:
        """One copy of these tokens for every block, in order."""
        blocks = range(1, self.num_blocks + 1)
        return [
            Copy(CopyId(next(self._ids)), direction, BlockId(b), BlockId(b), start, num_tokens, CopyDeps())
            for b in blocks
        ]

    def run(self, copies: list[Copy]) -> float:
        """Bytes/s from submission to the last acknowledgement."""
        began_s = time.perf_counter()
        self.tier.transfers.submit(copies)
        self.wait(len(copies))
        return sum(copy.num_tokens for copy in copies) * self._layout.token_bytes / (time.perf_counter() - began_s)

    def wait(self, n: int) -> None:
        """Wait for n acknowledgements. Raises RuntimeError for a failed or a missing one."""
        deadline = time.perf_counter() + PATIENCE_S
        while n > 0:
            for ack in self.tier.transfers.poll():
                n -= 1
                if not ack.ok:
                    raise RuntimeError(f"copy {ack.id} failed")
            if n > 0:
                self._clock.wait(self._clock.now() + 0.01)  # an acknowledgement ends it
            if time.perf_counter() > deadline:
                raise RuntimeError(f"{n} copies were not acknowledged")


def copies(rig: Rig, shape: Shape, ceilings: Ceilings) -> Iterator[Result]:
    """Bandwidth of whole blocks and of store chunks, alone and during decoding, and the slow-down of the decoding."""
    work = Copies(rig, shape.copy_blocks)
    store_chunk = min(STORE_CHUNK, rig.layout.block_size // 2)
    try:
        work.run(work.make(Direction.STORE, 0, rig.layout.block_size))
        for direction in Direction:
            limit = ceilings[f"{direction.value}_bytes_per_s"]
            for what, num_tokens in (("blocks", rig.layout.block_size), ("store chunks", store_chunk)):
                rate = statistics.median(work.run(work.make(direction, 0, num_tokens)) for _ in range(5))
                yield {
                    "kind": f"{direction.value} of {what}, alone",
                    "bytes_per_s": rate,
                    "share_of_measured_link": rate / limit,
                }
        both = [*work.make(Direction.STORE, 0, store_chunk), *work.make(Direction.LOAD, store_chunk, store_chunk)]
        yield {"kind": "store chunks both ways at once", "bytes_per_s": work.run(both)}
        yield from _copies_under_compute(rig, shape, work)
    finally:
        work.tier.transfers.close()


def _copies_under_compute(rig: Rig, shape: Shape, work: Copies) -> Iterator[Result]:
    context = min(CONTEXT_UNDER_COPIES, shape.contexts[-1])
    per_seq = rig.blocks_for(context + ROOM)
    batch = min(shape.batches[-1], 32, (rig.pool.num_blocks - 1 - work.num_blocks) // per_seq)
    if batch < 1:
        yield {"kind": "copies under compute", "skipped": "KV holds too few tokens"}
        return
    first = work.num_blocks + 1
    rig.assign([range(first + i * per_seq, first + (i + 1) * per_seq) for i in range(batch)])
    _, alone_s = _timed_decodes(rig, context, 30)
    for direction in Direction:
        moved, began_s, devices = 0, time.perf_counter(), []
        waiting: list[Copy] = []
        for i in range(WARM_UP + 30):
            # Enough copies in the queue that the link is never idle.
            while len(waiting) < 2 * work.num_blocks:
                more = work.make(direction, 0, rig.layout.block_size)
                work.tier.transfers.submit(more)
                waiting += more
            result = rig.decode(context + min(i, ROOM - 1))
            if i >= WARM_UP:
                devices.append(result.device_s)
            done = len(work.tier.transfers.poll())
            moved += done
            waiting = waiting[done:]
        rate = moved * rig.layout.block_bytes / (time.perf_counter() - began_s)
        work.wait(len(waiting))
        during_s = statistics.median(devices)
        yield {
            "kind": f"{direction.value} under decoding",
            "batch": batch,
            "context": context,
            "bytes_per_s": rate,
            "decode_alone_ms": alone_s * 1e3,
            "decode_during_ms": during_s * 1e3,
            "slowdown": during_s / alone_s - 1,
        }


class Preemption:
    """One long request that is preempted and resumed while `others` decode, through the real manager and link."""

    def __init__(self, rig: Rig, shape: Shape, *, write_through: bool) -> None:
        self._rig = rig
        self._context = shape.contexts[-1]
        self._short = shape.contexts[0]
        blocks, short_blocks = (rig.blocks_for(n + ROOM) for n in (self._context, self._short))
        store_chunk = min(STORE_CHUNK, rig.layout.block_size)
        num_host_blocks = 2 * blocks + 1
        table = RequestTable()
        self._kv = KVCacheManager(
            table,
            BlockPool(rig.pool.num_blocks),
            rig.layout.block_size,
            self._context,
            BlockPool(num_host_blocks),
            options=OffloadOptions(write_through, True, store_chunk),
        )
        self._others = min(shape.batches[-1], 16, (rig.pool.num_blocks - 1 - blocks) // short_blocks)
        table.add("long")
        self._kv.extend("long", self._context, self._context)
        table.add("newcomer")
        for i in range(self._others):
            table.add(f"r{i}")
            self._kv.extend(f"r{i}", self._short + ROOM, self._short + ROOM)
        rig.assign([self._kv.view(f"r{i}").blocks for i in range(self._others)])
        self._during_s: list[float] = []
        # Last: if it fails, there is nothing to close yet.
        self._tier = rig.host_tier(num_host_blocks)

    def measure(self) -> Result:
        """Run it once."""
        kv, link, rig = self._kv, self._tier.transfers, self._rig
        _, quiet_s = _timed_decodes(rig, self._short, 30)
        # Everything written so far counts as written by finished steps.
        over = StepId(10**9)
        kv.begin_step(over)
        link.complete(over)
        stored = kv.plan_stores(["long"], self._context)
        link.submit(stored)
        self._decode_until_moved()
        self._during_s.clear()

        began_s = time.perf_counter()
        dirty = self._context - kv.view("long").num_host_tokens
        link.submit(kv.preempt("long"))
        preempted_s = time.perf_counter()
        self._decode_until_moved()
        evicted_s = time.perf_counter()
        if kv.view("long").state is not KVState.HOST:
            raise RuntimeError(f"the request is {kv.view('long').state.name}, not on the host")

        # Another request takes the blocks; otherwise there would be nothing to load.
        kv.extend("newcomer", kv.num_free_blocks * rig.layout.block_size, self._context)
        kv.release("newcomer")
        resume_s = time.perf_counter()
        loads = kv.resume("long", rig.blocks_for(self._context))
        link.submit(loads)
        called_s = time.perf_counter()
        self._decode_until_moved()
        resumed_s = time.perf_counter()
        if kv.view("long").state is not KVState.DEVICE:
            raise RuntimeError(f"the request is {kv.view('long').state.name}, not back on the device")
        return {
            "kind": "preempt and resume",
            "write_through": bool(stored),
            "context": self._context,
            "dirty_tokens": dirty,
            "loaded_tokens": sum(copy.num_tokens for copy in loads),
            "preempt_call_ms": (preempted_s - began_s) * 1e3,
            "evicted_after_ms": (evicted_s - began_s) * 1e3,
            "resume_call_ms": (called_s - resume_s) * 1e3,
            "resumed_after_ms": (resumed_s - resume_s) * 1e3,
            "running_batch": self._others,
            "decode_quiet_ms": quiet_s * 1e3,
            "decode_during_median_ms": statistics.median(self._during_s) * 1e3,
            "decode_during_worst_ms": max(self._during_s) * 1e3,
        }

    def close(self) -> None:
        """Free the host memory."""
        self._tier.transfers.close()

    def _decode_until_moved(self) -> None:
        """Let the others decode until all copies have ended; at least one step."""
        kv, deadline = self._kv, time.perf_counter() + PATIENCE_S
        while True:
            self._during_s.append(self._rig.decode(self._short).device_s)
            for ack in self._tier.transfers.poll():
                kv.ack(ack)
            if not any(kv.num_queued_tokens(direction) for direction in Direction):
                return
            if time.perf_counter() > deadline:
                raise RuntimeError("copies were not acknowledged")


def preemption(rig: Rig, shape: Shape) -> Iterator[Result]:
    """Preempt a long request and bring it back: with its KV written through before, and without."""
    for write_through in (True, False):
        once = Preemption(rig, shape, write_through=write_through)
        try:
            yield once.measure()
        finally:
            once.close()

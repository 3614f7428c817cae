"""The least time a step can take: over its operations, the larger of bytes over bandwidth and FLOPs over rate, summed.

Counted are the linears (weights, inputs and outputs once) and attention (KV read once, causal); both ceilings are those
measured on the machine. Norms, rotations, activations and the sampler are not: they are part of what a step loses.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_rig import Shape

Operations = list[tuple[float, float]]
"""Bytes and FLOPs of each operation of a step."""


def operations(shape: Shape, itemsize: int, seqs: int, new: int, context: int) -> Operations:
    """(bytes, FLOPs) of every operation of a step in which `seqs` sequences compute the last `new` of `context`."""
    tokens, heads = seqs * new, shape.heads * shape.head_dim
    kv = shape.kv_heads * shape.head_dim

    def linear(out: int, into: int, rows: int) -> tuple[float, float]:
        return (out * into + rows * (out + into)) * itemsize, 2.0 * rows * out * into

    pairs = seqs * (new * (context - new) + new * (new + 1) / 2)
    attention = (seqs * context * 2 * kv + 2 * tokens * heads) * itemsize, 4.0 * pairs * heads
    layer = [
        linear(heads + 2 * kv, shape.hidden, tokens),
        attention,
        linear(shape.hidden, heads, tokens),
        linear(2 * shape.intermediate, shape.hidden, tokens),
        linear(shape.hidden, shape.intermediate, tokens),
    ]
    return layer * shape.layers + [linear(shape.vocab, shape.hidden, seqs)]


def floor_s(ops: Operations, bytes_per_s: float, flops_per_s: float) -> float:
    """Seconds below which no step with these operations can be."""
    return sum(max(nbytes / bytes_per_s, flops / flops_per_s) for nbytes, flops in ops)


def timed(work: Callable[[], Any], device: str, repeats: int) -> float:
    """Median seconds of `work`, after three calls to warm up: by device events on a GPU."""
    seconds = []
    for i in range(repeats + 3):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            taken = float(begin.elapsed_time(end)) / 1e3
        else:
            started = time.perf_counter()
            work()
            taken = time.perf_counter() - started
        if i >= 3:
            seconds.append(taken)
    return statistics.median(seconds)


def kernels_s(work: Callable[[], Any], device: str, most: int = 8) -> dict[str, float]:
    """Seconds that one call keeps the GPU busy, `busy`, and those of the `most` kernels that take most; CPU: nothing.

    What a step takes beyond `busy` it spends waiting for the host, or between kernels.
    """
    if device != "cuda":
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    taken = {event.key: event.self_device_time_total / 1e6 for event in profiler.key_averages()}
    ranked = sorted(taken.items(), key=lambda item: -item[1])[:most]
    return {"busy": sum(taken.values()), **{name[:80]: seconds for name, seconds in ranked}}


def measure_ceilings(device: str, *, small: bool) -> dict[str, float]:
    """Copy bandwidth on the device (read and written), matrix rate on random data, PCIe each way from pinned memory."""
    size, side = (2**24, 256) if small else (2**32, 8192)
    dtype = torch.float32 if small else torch.bfloat16
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    ceilings = {"copy_bytes_per_s": 2 * size / timed(lambda: target.copy_(source), device, 10)}
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty(side, side, dtype=dtype, device=device)
    ceilings["matmul_flops_per_s"] = 2 * side**3 / timed(lambda: torch.matmul(a, b, out=out), device, 20)
    host = torch.empty(size // 4, dtype=torch.uint8, pin_memory=device == "cuda")
    host.random_(0, 255)
    part = source[: size // 4]
    for name, work in (
        ("load_bytes_per_s", lambda: part.copy_(host, non_blocking=True)),
        ("store_bytes_per_s", lambda: host.copy_(part, non_blocking=True)),
    ):
        ceilings[name] = size // 4 / timed(work, device, 5)
    return ceilings

"""The roofline of the GPU benchmark's steps (tfserve.bench.roofline), its ceilings, and where a step's time goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.rig import Shape, model_config
from tfserve.bench.roofline import Operations, Work, copy_bytes_per_s, step_operations, timed


def operations(shape: Shape, itemsize: int, seqs: int, new: int, context: int) -> Operations:
    """(bytes, FLOPs) of every operation of a step in which `seqs` sequences compute the last `new` of `context`."""
    pairs = seqs * (new * (context - new) + new * (new + 1) / 2)
    work = Work(tokens=seqs * new, sampled=seqs, pairs=pairs, kv_tokens=seqs * context)
    return step_operations(model_config(shape, context), work, weight_bytes=itemsize, itemsize=itemsize)


def kernels_s(work: Callable[[], Any], device: str, most: int = 8) -> dict[str, float]:
    """Seconds that one call keeps the GPU busy, `busy`, and those of the `most` kernels that take most; CPU: nothing.

    The rest of a step's time is waiting for the host, or gaps between kernels.
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
    ceilings = {"copy_bytes_per_s": copy_bytes_per_s(device, size)}
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty(side, side, dtype=dtype, device=device)
    ceilings["matmul_flops_per_s"] = 2 * side**3 / timed(lambda: torch.matmul(a, b, out=out), device, 20)
    host = torch.empty(size // 4, dtype=torch.uint8, pin_memory=device == "cuda")
    part = source[: size // 4]
    host.copy_(part)
    for name, work in (
        ("load_bytes_per_s", lambda: part.copy_(host, non_blocking=True)),
        ("store_bytes_per_s", lambda: host.copy_(part, non_blocking=True)),
    ):
        ceilings[name] = size // 4 / timed(work, device, 5)
    return ceilings

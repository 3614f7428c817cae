"""Lower bound of a step's time: the sum over its operations of max(bytes / bandwidth, FLOPs / rate).

It counts the linears (weights, inputs and outputs once) and attention (KV read once, causal), with the ceilings
measured on the machine. It does not count norms, rotations, activations and the sampler. Williams, Waterman, Patterson:
Roofline (CACM 2009).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from tfserve.model.layers.linear import Linear, WeightFormat
from tfserve.model.loading.config import ModelConfig

Operations = list[tuple[float, float]]
"""Bytes and FLOPs of each operation of a step."""

_WARM_UP = 3


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """The work of a step: `tokens`, of which `sampled` get logits; attention over `pairs` of tokens, reading
    `kv_tokens` of KV.
    """

    tokens: int
    sampled: int
    pairs: float
    kv_tokens: float


def step_operations(config: ModelConfig, work: Work, *, weight_bytes: int, itemsize: int) -> Operations:
    """Every operation of a step; `weight_bytes` a weight of a linear, `itemsize` an activation and a value of KV."""

    def linear(out: int, into: int, rows: int) -> tuple[float, float]:
        return out * into * weight_bytes + rows * (out + into) * itemsize, 2.0 * rows * out * into

    heads, kv = config.q_size, config.kv_size
    attention = (work.kv_tokens * 2 * kv + 2 * work.tokens * heads) * itemsize, 4.0 * work.pairs * heads
    layer = [
        linear(heads + 2 * kv, config.hidden_size, work.tokens),
        attention,
        linear(config.hidden_size, heads, work.tokens),
        linear(2 * config.intermediate_size, config.hidden_size, work.tokens),
        linear(config.hidden_size, config.intermediate_size, work.tokens),
    ]
    return layer * config.num_hidden_layers + [linear(config.vocab_size, config.hidden_size, work.sampled)]


def floor_s(ops: Operations, bytes_per_s: float, flops_per_s: float) -> float:
    """Lower bound of the time of a step with these operations, in seconds."""
    return sum(max(nbytes / bytes_per_s, flops / flops_per_s) for nbytes, flops in ops)


def timed(work: Callable[[], Any], device: str, repeats: int) -> float:
    """Median seconds of `work`, after three calls to warm up: by device events on a GPU."""
    seconds = []
    for i in range(repeats + _WARM_UP):
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
        if i >= _WARM_UP:
            seconds.append(taken)
    return statistics.median(seconds)


def copy_bytes_per_s(device: str, nbytes: int) -> float:
    """Bandwidth of a copy of so many bytes inside the device's memory: bytes read and written."""
    source = torch.empty(nbytes, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    return 2 * nbytes / timed(lambda: target.copy_(source), device, 10)


def bytes_per_s(device: str, nbytes: int) -> float:
    """Bandwidth of the device's memory with so many bytes: the higher of a read and a copy."""
    numbers = torch.ones(nbytes // 4, device=device)
    return max(nbytes / timed(numbers.sum, device, 10), copy_bytes_per_s(device, nbytes))


@torch.inference_mode()
def linear_flops_per_s(fmt: WeightFormat, side: int, rows: int) -> float:
    """Rate of a linear layer of `side` inputs and outputs on `rows` rows, in the model's weight format."""
    linear = Linear(side, side, bias=False, fmt=fmt)
    linear.load(torch.randn(side, side, device=fmt.device), None)
    x = torch.randn(rows, side, device=fmt.device).to(fmt.dtype)
    return 2 * rows * side**2 / timed(lambda: linear(x), fmt.device.type, 10)

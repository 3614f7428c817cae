"""Draws tokens from weights: filters as one threshold per row, and a random number as a function of (seed, position).

The draw inverts the cumulative distribution in vocabulary order: a small change of the logits changes the token only if
the random number lies close to a step of that distribution.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from tfserve.model.runner.staging import upload

CANDIDATES = 1024
"""Number of highest probabilities that are searched first for a nucleus; a wider one is searched in 8 times as many."""

_FLOAT_BITS = 30
"""Bits in which float32 numbers from 0 to 1 differ."""

_BLOCK = 256
_MIN_BLOCK = 32
"""Blocks of rows have 256 tokens, or the largest power of two that divides the vocabulary, if not below this."""

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def uniform(seeds: npt.NDArray[np.uint64], positions: IntArray) -> FloatArray:
    """One number in [0, 1) per row, a function of (seed, position) alone: element `position` of a SplitMix64 stream.

    The seed is mixed first, so that neighbouring seeds give unrelated streams.
    """
    with np.errstate(over="ignore"):
        steps = positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bits = _mix(_mix(seeds + np.uint64(0x9E3779B97F4A7C15)) + steps)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def keep_thresholds(
    weights: Tensor, top_k: IntArray, top_p: FloatArray, min_p: FloatArray, scratch: Tensor
) -> Tensor | None:
    """The lowest weight [N] fp32 that top-k, then top-p, then min-p keep in each row; None if no row has a filter.

    `weights` fp32 [N, V] are probabilities divided by the highest of their row; 0, 1 and 0 switch a row's filters off.
    top-p counts the mass that top-k keeps. Ties with the last kept token are kept too; the most likely token is always
    kept. `scratch` is working memory like `weights`.
    """
    ranked = np.flatnonzero(((top_k > 0) & (top_k < weights.shape[1])) | (top_p < 1))
    if not ranked.size and not min_p.any():
        return None
    threshold, index = upload(weights.device, min_p.astype(np.float32), ranked)
    if ranked.size:
        part = weights if ranked.size == len(weights) else weights[index]
        if weights.device.type == "cpu":
            found = _rank_thresholds(part, top_k[ranked], top_p[ranked], CANDIDATES, scratch[: len(part)])
        else:
            found = search_thresholds(part, top_k[ranked], top_p[ranked], scratch[: len(part)])
        threshold[index] = torch.maximum(threshold[index], found)
    return threshold


def search_thresholds(weights: Tensor, top_k: IntArray, top_p: FloatArray, scratch: Tensor) -> Tensor:
    """Thresholds [N] of top-k and top-p, as in keep_thresholds, computed without waiting on the host.

    A nucleus ends at the highest threshold with enough mass above it. Non-negative floats are ordered as their bits, so
    bisection over the bits finds it in 30 passes over the weights, for a nucleus of any width. A search among the top
    candidates would need a decision on the host.
    """
    vocab_size = weights.shape[1]
    limited = (top_k > 0) & (top_k < vocab_size)
    nucleus = top_p < 1
    arrays = np.where(limited, top_k, 1) - 1, limited, nucleus, top_p
    rank, is_limited, is_nucleus, share = upload(weights.device, *arrays)
    kth = torch.zeros_like(weights[:, 0])
    if limited.any():
        top = weights.topk(int(top_k[limited].max())).values
        kth = torch.where(is_limited, top.gather(1, rank[:, None])[:, 0], kth)
    if not nucleus.any():
        return kth

    def mass(threshold: Tensor) -> Tensor:
        kept = torch.mul(weights, weights >= torch.maximum(threshold, kth)[:, None], out=scratch)
        return kept.sum(-1, dtype=torch.float64)

    # Threshold 0 has all the mass; no weight is above 1.
    low = torch.zeros_like(kth, dtype=torch.int32)
    high = torch.ones_like(kth).view(torch.int32) + 1
    wanted = share * mass(low.view(torch.float32))
    for _ in range(_FLOAT_BITS):
        middle = (low + high) >> 1
        enough = mass(middle.view(torch.float32)) >= wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return torch.where(is_nucleus, torch.maximum(low.view(torch.float32), kth), kth)


def _rank_thresholds(weights: Tensor, top_k: IntArray, top_p: FloatArray, candidates: int, scratch: Tensor) -> Tensor:
    """Thresholds [N] of top-k and top-p, on the CPU: searched in each row's highest `candidates`, then in more."""
    vocab_size = weights.shape[1]
    limited = (top_k > 0) & (top_k < vocab_size)
    nucleus = top_p < 1
    # One more than the highest k, to see whether a tie at rank k continues.
    width = int(top_k[limited].max(initial=0)) + 1
    width = min(max(width, candidates) if nucleus.any() else width, vocab_size)
    top = _largest(weights, width, scratch)  # [N, width], descending
    is_limited, is_nucleus = torch.from_numpy(limited), torch.from_numpy(nucleus)
    rank = torch.from_numpy(np.where(limited, top_k, 1) - 1)
    kth = torch.where(is_limited, top.gather(1, rank[:, None])[:, 0], 0.0)
    if not nucleus.any():
        return kth
    mass = torch.where(top >= kth[:, None], top, 0.0).cumsum(-1, dtype=torch.float64)
    whole = torch.where(is_limited, mass[:, -1], weights.sum(-1, dtype=torch.float64))
    wanted = torch.from_numpy(top_p) * whole
    last = (mass < wanted[:, None]).sum(-1)
    beyond = (last == width) | (is_limited & (kth > 0) & (top[:, -1] >= kth))
    nucleus_end = top.gather(1, last.clamp(max=width - 1)[:, None])[:, 0]
    threshold = torch.where(is_nucleus, torch.maximum(kth, nucleus_end), kth)
    if width == vocab_size:
        return threshold
    unsure = torch.nonzero(is_nucleus & beyond)[:, 0]
    if len(unsure):
        rows = unsure.numpy()
        threshold[unsure] = _rank_thresholds(
            weights[unsure], top_k[rows], top_p[rows], 8 * candidates, scratch[: len(rows)]
        )
    return threshold


def _largest(values: Tensor, count: int, scratch: Tensor) -> Tensor:
    """The `count` highest values [N, count] of each row, descending."""
    # numpy selects with SIMD and without indices: 10 times faster than torch.topk for 1,024 of 49,152.
    array = scratch.copy_(values).numpy()
    if count < array.shape[1]:
        array.partition(array.shape[1] - count, axis=-1)
    found = array[:, -count:]
    found.sort(axis=-1)
    return torch.from_numpy(np.ascontiguousarray(found[:, ::-1]))


def highest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The highest value fp32 [N] of each row of `logits` [N, V] and its first token int64 [N]; NaN is above all."""
    size = math.gcd(logits.shape[1], _BLOCK)
    if size < _MIN_BLOCK:
        value, token = logits.max(-1)
        return value, token
    # First the block, then the index in it: the pass over all logits needs no indices and is 5 times faster.
    blocks = logits.view(len(logits), -1, size)
    value, block = blocks.amax(-1).max(-1)
    return value, block * size + _pick(blocks, block).argmax(-1)


def draw(weights: Tensor, numbers: FloatArray) -> Tensor:
    """The token int64 [N] where a row's cumulative weight first exceeds number * total.

    `weights` is fp32 [N, V], not negative and not all 0; `numbers` are in [0, 1). A token with weight 0 is never drawn.
    Tokens of a block are summed in fp32; sums over blocks, and over the tokens of the chosen block, in fp64.
    """
    size = math.gcd(weights.shape[1], _BLOCK)
    if size < _MIN_BLOCK:
        size = _BLOCK
        weights = functional.pad(weights, (0, -weights.shape[1] % size))
    blocks = weights.view(len(weights), -1, size)  # [N, V / size, size]
    cumulative = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1]
    target = torch.minimum(upload(total.device, numbers)[0] * total, _just_below(total))
    block = (cumulative <= target[:, None]).sum(-1)
    before = functional.pad(cumulative, (1, 0)).gather(1, block[:, None])[:, 0]
    inside = _pick(blocks, block).cumsum(-1, dtype=torch.float64)
    # Rounding may put the draw beyond the block's last running sum: clamp it to the block.
    rest = torch.minimum(target - before, _just_below(inside[:, -1]))
    return block * size + (inside <= rest[:, None]).sum(-1)


def _pick(blocks: Tensor, block: Tensor) -> Tensor:
    """One block [N, size] of each row of `blocks` [N, count, size]."""
    return blocks[torch.arange(len(blocks), device=blocks.device), block]


def _just_below(value: Tensor) -> Tensor:
    return torch.nextafter(value, torch.zeros_like(value))

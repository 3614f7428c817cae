"""Rotary position embeddings, default and llama3. Source: LlamaRotaryEmbedding of transformers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tfserve.model.loading.config import Llama3RopeScaling, ModelConfig


class Rotary:
    """The rotations of positions, as unit complex numbers.

    They are computed for the positions of a step; there is no table for the longest context. Angles are float32
    (bfloat16 angles are wrong by whole turns at long contexts).
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._inv_freq = inverse_frequencies(config).to(device)

    def at(self, positions: Tensor) -> Tensor:
        """Rotations `[T, 1, head_dim / 2]` complex64 for `positions [T]`: once per step, for all layers."""
        angles = torch.outer(positions.to(torch.float32), self._inv_freq)
        return torch.complex(angles.cos(), angles.sin()).unsqueeze(1)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotate each pair of neighbours of `x [T, heads, head_dim]` by `rotations [T, 1, head_dim / 2]`; a new tensor."""
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotations).view(x.shape).to(x.dtype)


def interleave_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Reorder a q or k projection's output `rows [heads * head_dim, ...]` so that rotated pairs become neighbours.

    Hugging Face's Llama rotates element i with element i + head_dim / 2. With both next to each other a rotation is one
    complex multiplication (a third of the time on a CPU). The order does not change q . k, which sums over head_dim.
    """
    return rows.view(-1, 2, head_dim // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each rotated pair: `[head_dim / 2]`, float32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    inv_freq = 1.0 / config.rope_theta**exponents
    return inv_freq if config.rope_scaling is None else _stretch_slow(inv_freq, config.rope_scaling)


def _stretch_slow(inv_freq: Tensor, scaling: Llama3RopeScaling) -> Tensor:
    """Llama 3.1: divide slow frequencies by `factor`, keep fast ones, blend in between."""
    wavelength = 2 * math.pi / inv_freq
    turns = scaling.original_max_position_embeddings / wavelength  # full rotations within the trained context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * inv_freq / scaling.factor + blend * inv_freq

"""RMSNorm and the gated MLP."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tfserve.model.config import ModelConfig
from tfserve.model.linear import Linear, WeightFormat


class RMSNorm(nn.Module):
    """Root-mean-square norm. `weight [H]` is applied here, or None where the loader folded it into the next linear.

    Folded, the norm is `x / |x|` and the linear's weight carries `folded_scale`: three ops instead of five, a third
    of the time on a CPU. Source: LlamaRMSNorm of transformers.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight: Tensor | None = None
        self._shape, self._eps = (hidden_size,), eps
        self._sqrt_size = math.sqrt(hidden_size)
        self._floor = torch.tensor(math.sqrt(eps * hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the rows of `x [N, H]`."""
        if self.weight is not None:
            return nn.functional.rms_norm(x, self._shape, self.weight, self._eps)
        # sqrt(mean(x^2) + eps) = hypot(|x|, sqrt(eps H)) / sqrt(H)
        size: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self._floor)
        return x / size

    def folded_scale(self, weight: Tensor) -> Tensor:
        """What to multiply the next linear's input columns with, `[H]`, when this norm's `weight` stays None."""
        return weight * self._sqrt_size


class MLP(nn.Module):
    """SiLU-gated linear unit; gate and up are one matrix. Source: LlamaMLP of transformers."""

    def __init__(self, config: ModelConfig, fmt: WeightFormat) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, config.mlp_bias, fmt)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias, fmt)

    def forward(self, x: Tensor) -> Tensor:
        """From normalised hidden states `[T, H]` to what is added to the residual, `[T, H]`."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(nn.functional.silu(gate).mul_(up))
        return out

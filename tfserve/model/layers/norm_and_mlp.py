"""RMSNorm and the gated MLP."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tfserve.model.layers.linear import Linear, WeightFormat
from tfserve.model.loading.config import ModelConfig


class RMSNorm(nn.Module):
    """Root-mean-square norm, its weight applied here (`load`) or by the linear that follows (`fold_into`).

    Source: LlamaRMSNorm of transformers.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self._shape, self._eps = (hidden_size,), eps
        self._sqrt_size = math.sqrt(hidden_size)
        self._floor = torch.tensor(math.sqrt(eps * hidden_size))
        self._weight: Tensor | None = None
        self._scale: Tensor | None = None

    def load(self, weight: Tensor) -> None:
        """Take `weight [H]`, in the model's dtype and on its device."""
        self._weight, self._scale = weight, weight * self._sqrt_size

    @property
    def weight(self) -> Tensor:
        """The weight `[H]` that `load` took."""
        assert self._weight is not None
        return self._weight

    def fold_into(self, linear_weight: Tensor, weight: Tensor) -> Tensor:
        """The next linear's `linear_weight [out, H]` with this norm's `weight [H]` folded in; the norm keeps none."""
        return linear_weight * (weight * self._sqrt_size)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the rows of `x [N, H]`; a new tensor."""
        if x.dtype != torch.float32 or x.device.type != "cpu":
            return nn.functional.rms_norm(x, self._shape, self._weight, self._eps)
        # sqrt(mean(x^2) + eps) = hypot(|x|, sqrt(eps H)) / sqrt(H): half the time of rms_norm, which has no CPU kernel.
        out: Tensor = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self._floor)
        return out if self._scale is None else out.mul_(self._scale)


class HeadNorm(RMSNorm):
    """RMSNorm of each head by itself; `load` takes a weight for each, `[heads, D]`. Source: Qwen3RMSNorm."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x [T, heads, D]`; a new tensor."""
        if x.dtype != torch.float32 or x.device.type != "cpu":
            return nn.functional.rms_norm(x, self._shape, None, self._eps).mul_(self.weight)
        return super().forward(x)


class MLP(nn.Module):
    """SiLU-gated MLP; gate and up are one matrix. Source: LlamaMLP of transformers."""

    def __init__(self, config: ModelConfig, fmt: WeightFormat) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, config.mlp_bias, fmt)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias, fmt)

    def forward(self, x: Tensor) -> Tensor:
        """From normalised hidden states `[T, H]` to the addend of the residual, `[T, H]`."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(nn.functional.silu(gate).mul_(up))
        return out

"""A linear layer with three formats of its weight: plain, packed for the CPU, or int8."""

from __future__ import annotations

import warnings
from typing import Literal, Protocol

import msgspec
import torch
from torch import Tensor, nn

from tfserve.errors import ConfigError

WeightKind = Literal["plain", "packed", "int8"]


class WeightFormat(msgspec.Struct, frozen=True):
    """Format of a model's linear weights: `kind`, the dtype of the computation, and the device."""

    kind: WeightKind
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def choose(cls, dtype: torch.dtype, device: torch.device, quantization: str | None) -> WeightFormat:
        """The fastest format on this machine. Raises ConfigError if it cannot compute in int8."""
        if quantization == "int8":
            _require_int8(dtype, device)
            return cls("int8", dtype, device)
        has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        packs = has_onednn and device.type == "cpu" and dtype == torch.float32
        return cls("packed" if packs else "plain", dtype, device)

    @property
    def folds_norms(self) -> bool:
        """True if norm weights are multiplied into the next linear's weight at load: exact enough in float32 only.

        In int8 they stay separate, to even out the inputs (SmolLM2's greedy choices: 87 % as in float32, folded 84 %).
        """
        return self.kind == "packed"


class Linear(nn.Module):
    """`x @ weight.T + bias`, with the weight in format `fmt`; call `load` first."""

    def __init__(self, in_features: int, out_features: int, bias: bool, fmt: WeightFormat) -> None:
        super().__init__()
        self.in_features, self.out_features, self.has_bias = in_features, out_features, bias
        self._format = fmt

    def load(self, weight: Tensor, bias: Tensor | None) -> None:
        """Set `weight [out, in]` and `bias [out]` (or None), of any float dtype."""
        assert weight.shape == (self.out_features, self.in_features)
        assert (bias is not None) == self.has_bias
        weight = weight.to(self._format.device, self._format.dtype)
        bias = None if bias is None else bias.to(self._format.device, self._format.dtype)
        self._kernel: _Kernel = self._make_kernel(weight, bias)

    def load_quantized(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """Set the result of `quantized` of an int8 layer of the same shape."""
        assert weight.shape == (self.out_features, self.in_features)
        assert (bias is not None) == self.has_bias
        self._kernel = _Int8(weight, scale, bias)

    def quantized(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """An int8 layer's weight `[out, in]` int8, the size of its steps `[out]` float64, and its bias."""
        assert isinstance(self._kernel, _Int8)
        return self._kernel.parts()

    def forward(self, x: Tensor) -> Tensor:
        """From `x [N, in]` in the model's dtype to `[N, out]`, a new tensor."""
        return self._kernel(x)

    def _make_kernel(self, weight: Tensor, bias: Tensor | None) -> _Kernel:
        if self._format.kind == "int8":
            return _Int8(*quantize(weight), bias)
        return _Packed(weight, bias) if self._format.kind == "packed" else _Plain(weight, bias)

    def extra_repr(self) -> str:
        """For printing the model."""
        return f"{self.in_features}, {self.out_features}, bias={self.has_bias}, {self._format.kind}"


class _Kernel(Protocol):
    def __call__(self, x: Tensor) -> Tensor: ...


class _Plain:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self._weight, self._bias)


class _Packed:
    """oneDNN's blocked layout, reordered once here; F.linear reorders in every call."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return out


class _Int8:
    """Weights int8 with one scale per output channel, inputs 8-bit with one scale per row, sums exact in 32 bits.

    torch's own `linear_dynamic` has one scale for the whole batch: an outlier of one request would cost the others
    precision, and tokens would depend on the batch. So each row is scaled to [-1, 1] here, and scaled back after.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        zero = torch.zeros(len(weight), dtype=torch.int64)
        with warnings.catch_warnings():
            # Deprecated, but the only way to make the weight for linear_prepack.
            warnings.filterwarnings("ignore", category=UserWarning)
            quantized = torch._make_per_channel_quantized_tensor(weight, scale, zero, 0)
        self._weight = torch.ops.quantized.linear_prepack(quantized, None)
        self._bias = bias

    def parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        quantized, _ = torch.ops.quantized.linear_unpack(self._weight)
        return quantized.int_repr(), quantized.q_per_channel_scales(), self._bias

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor
        size = x.abs().amax(dim=-1, keepdim=True).clamp_(min=_TINY)  # vector_norm(inf) takes ten times as long
        out = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x / size, 1 / 127, 128, self._weight)
        return out.mul_(size) if self._bias is None else torch.addcmul(self._bias, out, size)


_TINY = 1e-30


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """From `weight [out, in]` float32 to int8 steps of the same shape and the size of a step, `[out]` float64."""
    scale = saturation_free_scale(weight)
    steps = (weight / scale[:, None]).round_().clamp_(-128, 127)
    return steps.to(torch.int8), scale.double()


def saturation_free_scale(weight: Tensor) -> Tensor:
    """Size of one int8 step for each output channel of `weight [out, in]`: `[out]`.

    Without VNNI, fbgemm adds two neighbouring products of an 8-bit input and a weight in 16 bits, which overflows (and
    ruins the sum, silently) unless neighbouring weights of one sign add up to no more than 32767 / 255 = 128. This
    limit costs a third of a bit of weight precision and is kept on every machine; torch's `reduce_range` costs a whole
    bit of input precision.
    """
    odd = weight.shape[1] % 2
    pairs = weight[:, : weight.shape[1] - odd : 2] + weight[:, 1::2]
    largest = torch.maximum(weight.abs().amax(dim=1), pairs.abs_().amax(dim=1))
    return (largest / 127).clamp(min=_TINY)  # 127, not 128: rounding may add one


def _require_int8(dtype: torch.dtype, device: torch.device) -> None:
    if device.type != "cpu":
        raise ConfigError("quantization", f"int8 runs on the CPU only, and the device is {device.type}: leave it out")
    if dtype != torch.float32:
        name = str(dtype).removeprefix("torch.")
        raise ConfigError("quantization", f"int8 computes in float32: set dtype to float32 or auto, not {name}")
    if not {"x86", "fbgemm"} & set(torch.backends.quantized.supported_engines):
        raise ConfigError("quantization", "int8 needs torch built with fbgemm, which this one is not: leave it out")

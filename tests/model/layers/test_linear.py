from __future__ import annotations

import pytest
import torch

from tfserve.errors import ConfigError
from tfserve.model.layers.linear import Linear, WeightFormat, WeightKind

CPU = torch.device("cpu")


def linear(kind: WeightKind, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    layer = Linear(weight.shape[1], weight.shape[0], bias is not None, WeightFormat(kind, torch.float32, CPU))
    layer.load(weight, bias)
    return layer


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_float_kinds_equal_the_definition(kind: WeightKind, rows: int) -> None:
    x, weight, bias = random(rows, 96), random(50, 96), random(50)
    torch.testing.assert_close(linear(kind, weight, bias)(x), x @ weight.T + bias, atol=1e-4, rtol=0)
    torch.testing.assert_close(linear(kind, weight)(x), x @ weight.T, atol=1e-4, rtol=0)


@pytest.mark.parametrize("features", [95, 96, 576])
def test_int8_is_within_two_percent(features: int) -> None:
    x, weight, bias = random(40, features), random(50, features), random(50)
    exact = x @ weight.T + bias
    error = linear("int8", weight, bias)(x) - exact
    assert error.norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_int8_sums_do_not_saturate(sign: float) -> None:
    weight = torch.full((8, 576), 0.1 * sign)  # all of one sign, all at the limit: the worst case for a 16-bit sum
    out = linear("int8", weight)(torch.ones(2, 576))
    torch.testing.assert_close(out, torch.full((2, 8), 57.6 * sign), atol=0, rtol=0.01)


def test_int8_gives_each_row_its_own_scale() -> None:
    x, weight = random(2, 96), random(50, 96)
    x[1] *= 1e4
    alone = linear("int8", weight)(x[:1])
    assert torch.equal(linear("int8", weight)(x)[:1], alone)


def test_int8_of_zeros_is_zero() -> None:
    assert torch.equal(linear("int8", torch.zeros(8, 16))(random(2, 16)), torch.zeros(2, 8))
    assert torch.equal(linear("int8", random(8, 16))(torch.zeros(2, 16)), torch.zeros(2, 8))


def test_format_is_chosen_by_device_and_dtype() -> None:
    def kind(dtype: torch.dtype, device: str, quantization: str | None = None) -> WeightKind:
        return WeightFormat.choose(dtype, torch.device(device), quantization).kind

    assert kind(torch.float32, "cpu") == "packed"
    assert kind(torch.bfloat16, "cpu") == "plain"
    assert kind(torch.float32, "cuda") == "plain"
    assert kind(torch.float32, "cpu", "int8") == "int8"
    with pytest.raises(ConfigError, match="int8 runs on the CPU only"):
        kind(torch.float32, "cuda", "int8")

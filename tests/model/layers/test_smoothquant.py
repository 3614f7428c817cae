"""Smoothing changes no result in float32, and makes int8 robust against large channels."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.model.test_parity import DenseAttention, load, run
from tests.tokenizers import write_tiny_tokenizer
from tfserve.model.decoder import DecoderLayer
from tfserve.model.layers.linear import WeightFormat
from tfserve.model.layers.rope import Rotary
from tfserve.model.layers.smoothquant import Smoother, calibration_ids, smoothing_factors
from tfserve.model.loading.config import ModelConfig, load_model_config
from tfserve.model.loading.weights import Tensors, fill
from tfserve.model.models.base import layer_weights

PLAIN = WeightFormat("plain", torch.float32, torch.device("cpu"))
IDS = torch.randint(0, 512, (40,), generator=torch.Generator().manual_seed(3))


def random_layer(config: ModelConfig) -> Tensors:
    random = torch.Generator().manual_seed(1)
    tensors: Tensors = {}
    for weight in layer_weights(config):
        rows = sum(part.rows if part.heads is None else part.heads for part in weight.parts)
        if weight.columns is None:
            shape = (rows,) if weight.parts[0].heads is None else (rows, config.head_dim)
            tensors[f"{weight.module}.weight"] = 0.5 + torch.rand(shape, generator=random)
        else:
            tensors[f"{weight.module}.weight"] = 0.1 * torch.randn(rows, weight.columns, generator=random)
        if weight.has_bias:
            tensors[f"{weight.module}.bias"] = torch.randn(rows, generator=random)
    return tensors


def layer_output(config: ModelConfig, tensors: Tensors, embeddings: Tensor) -> Tensor:
    with torch.inference_mode():
        layer = DecoderLayer(config, 0, PLAIN)
        fill(layer, layer_weights(config), tensors, PLAIN)
        residual = embeddings[IDS]
        layer(residual, Rotary(config, PLAIN.device).at(torch.arange(len(IDS))), DenseAttention())
    return residual


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("name", ["tiny_llama3", "tiny_qwen3"])
def test_a_smoothed_layer_computes_the_same(name: str, with_bias: bool, request: pytest.FixtureRequest) -> None:
    config = load_model_config(request.getfixturevalue(name))
    config = msgspec.structs.replace(config, qkv_bias=with_bias, o_bias=with_bias, mlp_bias=with_bias)
    embeddings = torch.randn(512, config.hidden_size, generator=torch.Generator().manual_seed(2))
    tensors = random_layer(config)
    qkv = tensors["attention.qkv_proj.weight"]
    before, first_columns = layer_output(config, tensors, embeddings), qkv[:, 0].clone()
    with torch.inference_mode():
        Smoother(config, embeddings, IDS.flip(0)).smooth_layer(tensors)
    assert not torch.allclose(qkv[:, 0], first_columns, rtol=0.1)
    torch.testing.assert_close(layer_output(config, tensors, embeddings), before, atol=1e-5, rtol=1e-5)


def test_a_smoothed_head_computes_the_same(tiny_llama3: Path) -> None:
    config = load_model_config(tiny_llama3)
    random = torch.Generator().manual_seed(5)
    embeddings, head = (torch.randn(512, config.hidden_size, generator=random) for _ in range(2))
    norm, x = torch.rand(config.hidden_size, generator=random), torch.randn(9, config.hidden_size, generator=random)
    tensors = {"norm.weight": norm, "lm_head.weight": head}
    Smoother(config, embeddings, IDS).smooth_head(tensors)
    smoothed = (x * tensors["norm.weight"]) @ tensors["lm_head.weight"].T
    torch.testing.assert_close(smoothed, (x * norm) @ head.T, atol=1e-4, rtol=0)


def plant_outliers(tensors: dict[str, Tensor], size: float, group: int) -> None:
    """Make channel 5 of every linear's input `size` times as large and its reader smaller: the same model."""
    for name in [name for name in tensors if name.endswith(".input_layernorm.weight")]:
        prefix = name.removesuffix("input_layernorm.weight")
        tensors[name][5] *= size
        for part in "qkv":
            tensors[f"{prefix}self_attn.{part}_proj.weight"][:, 5] /= size
        for kind in ("weight", "bias"):
            if (value := tensors.get(f"{prefix}self_attn.v_proj.{kind}")) is not None:
                value[5] *= size
        head_dim = tensors[f"{prefix}self_attn.o_proj.weight"].shape[1] // 8
        for head in range(group):
            tensors[f"{prefix}self_attn.o_proj.weight"][:, head * head_dim + 5] /= size
        tensors[f"{prefix}post_attention_layernorm.weight"][5] *= size
        for part in ("gate", "up"):
            tensors[f"{prefix}mlp.{part}_proj.weight"][:, 5] /= size
        tensors[f"{prefix}mlp.up_proj.weight"][5] *= size
        tensors[f"{prefix}mlp.down_proj.weight"][:, 5] /= size
    tensors["model.norm.weight"][5] *= size
    tensors["lm_head.weight"][:, 5] /= size


@pytest.mark.parametrize("name", ["tiny_llama3", "tiny_qwen25_untied"])
def test_outlier_channels_cost_int8_nothing(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    even: Path = request.getfixturevalue(name)
    uneven = Path(shutil.copytree(even, tmp_path / "uneven"))
    tensors = {}
    for shard in uneven.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    plant_outliers(tensors, size=64.0, group=4)
    save_file(tensors, uneven / "model.safetensors")
    exact = run(load(even), IDS, [40])
    torch.testing.assert_close(run(load(uneven), IDS, [40]), exact, atol=1e-3, rtol=0)
    errors = [(run(load(path, quantization="int8"), IDS, [40]) - exact).norm() for path in (even, uneven)]
    assert errors[1] < 1.3 * errors[0]


def test_channels_that_the_text_never_reached_get_a_finite_factor() -> None:
    factors = smoothing_factors(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0]))
    assert (factors > 0).all()
    assert factors.isfinite().all()


def test_calibration_reads_text_where_there_is_a_tokenizer(tmp_path: Path) -> None:
    guessed = calibration_ids(tmp_path, 512)
    assert torch.equal(guessed, calibration_ids(tmp_path, 512))
    read = calibration_ids(write_tiny_tokenizer(tmp_path), 512)
    assert len(read) > 200
    assert not torch.equal(read, guessed)
    assert calibration_ids(tmp_path, 300).max() < 300  # a tokenizer may know more tokens than the model

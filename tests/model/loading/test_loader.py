from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tfserve.errors import ConfigError, ModelError
from tfserve.model.decoder import Decoder
from tfserve.model.loading.config import load_model_config
from tfserve.model.loading.loader import load_model

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def load(path: Path, dtype: str = "float32", quantization: str | None = None) -> Decoder:
    config = load_model_config(path)
    return load_model(path, config, dtype=dtype, device="cpu", quantization=quantization, progress=False)


@pytest.fixture
def llama(tiny_llama3: Path, tmp_path: Path) -> Path:
    """A copy of a single-file checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_llama3, tmp_path / "model"))


@pytest.fixture
def sharded(tiny_qwen25: Path, tmp_path: Path) -> Path:
    """A copy of a sharded, tied checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_qwen25, tmp_path / "sharded"))


def edit(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_a_directory_without_weights_says_what_is_expected(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(
        ModelError, match=r"expected model\.safetensors or .*index\.json; pytorch_model\.bin cannot be read"
    ):
        load(llama)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=rf"index\.json names {shard.name}, which is not there"):
        load(sharded)


@pytest.mark.parametrize("content", ["", "[]", '{"metadata": {}}', '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_broken_index_is_named(content: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"index\.json.*download it again"):
        load(sharded)


@pytest.mark.parametrize("keep", [0, 5, 500, 50_000])
def test_a_truncated_file_is_named(keep: int, llama: Path) -> None:
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=rf"model\.safetensors \({keep} bytes\) is truncated .*download it again"):
        load(llama)


def test_a_missing_tensor_is_named(llama: Path) -> None:
    edit(llama, lambda tensors: tensors.pop(Q_PROJ))
    with pytest.raises(ModelError, match=f"lacks {Q_PROJ}:"):
        load(llama)


def test_unexpected_tensors_are_named_and_counted(llama: Path) -> None:
    edit(llama, lambda tensors: tensors.update({f"extra.{i}": torch.zeros(1) for i in range(6)}))
    with pytest.raises(ModelError, match=r"unexpected extra\.0, extra\.1, extra\.2, extra\.3 and 2 more"):
        load(llama)


def test_a_misshapen_tensor_is_named_with_both_shapes(llama: Path) -> None:
    edit(llama, lambda tensors: tensors.update({Q_PROJ: torch.zeros(64, 64)}))
    with pytest.raises(ModelError, match=rf"{Q_PROJ} has shape \[64, 64\], but config\.json makes it \[128, 64\]"):
        load(llama)


def test_integer_weights_are_refused(llama: Path) -> None:
    edit(llama, lambda tensors: tensors.update({Q_PROJ: torch.zeros(128, 64, dtype=torch.int8)}))
    with pytest.raises(ModelError, match=f"{Q_PROJ} has dtype I8"):
        load(llama)


@pytest.mark.parametrize(
    ("taken", "stored"),
    [
        ("weight", ("qweight", "qzeros", "scales", "g_idx")),
        ("weight", ("weight_packed", "weight_scale", "weight_shape")),
        (None, ("weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4")),
        (None, ("SCB",)),
        (None, ("weight_scale_inv",)),
    ],
    ids=["gptq and awq", "compressed-tensors", "bitsandbytes 4 bit", "bitsandbytes 8 bit", "fp8"],
)
def test_quantised_weights_are_called_that(taken: str | None, stored: tuple[str, ...], llama: Path) -> None:
    prefix = Q_PROJ.removesuffix("weight")

    def quantise(tensors: dict[str, Tensor]) -> None:
        if taken is not None:
            del tensors[prefix + taken]
        tensors.update({prefix + name: torch.zeros(4, dtype=torch.int32) for name in stored})

    edit(llama, quantise)
    with pytest.raises(ModelError, match=r"model\.safetensors: the weights are quantised .*unquantised checkpoint"):
        load(llama)


def test_known_extras_are_tolerated(llama: Path, sharded: Path) -> None:
    edit(llama, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    load(llama)

    tied = {}
    for shard in sharded.glob("*.safetensors"):
        tied |= load_file(shard)
    save_file(tied | {"lm_head.weight": torch.zeros(512, 64)}, sharded / "model.safetensors")
    ids = torch.arange(8)
    expected = logits(load(sharded), ids)
    (sharded / "model.safetensors").unlink()
    assert torch.equal(expected, logits(load(sharded), ids))


def test_shards_and_a_single_file_give_the_same_model(sharded: Path) -> None:
    ids = torch.arange(8)
    expected = logits(load(sharded), ids)
    tensors = {}
    for shard in sharded.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    save_file(tensors, sharded / "model.safetensors")
    assert torch.equal(logits(load(sharded), ids), expected)


def test_the_model_outlives_its_files(llama: Path) -> None:
    ids = torch.arange(8)
    decoder = load(llama, dtype="float32")
    expected = logits(decoder, ids)
    file = llama / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))  # in place: a mapped weight would turn to zeros
    assert torch.equal(logits(decoder, ids), expected)


def test_progress_is_drawn_only_when_asked_for(tiny_llama3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_model_config(tiny_llama3)
    for progress in (False, True):
        load_model(tiny_llama3, config, dtype="float32", device="cpu", quantization=None, progress=progress)
        assert ("loading weights" in capsys.readouterr().err) is progress


def test_int8_with_another_dtype_is_refused(tiny_llama3: Path) -> None:
    with pytest.raises(ConfigError, match=r"^quantization: int8 computes in float32: set dtype .* not bfloat16"):
        load(tiny_llama3, dtype="bfloat16", quantization="int8")


def test_llama_attention_and_mlp_biases_are_loaded(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.conftest import TINY, save_random

    config = LlamaConfig(**TINY, attention_bias=True, mlp_bias=True, max_position_embeddings=64)
    path = save_random(LlamaForCausalLM, config, tmp_path)
    assert load_model_config(path).num_parameters == sum(
        map(Tensor.numel, load_file(path / "model.safetensors").values())
    )
    model = LlamaForCausalLM.from_pretrained(path)
    ids = torch.arange(1)  # one token attends to itself alone
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    torch.testing.assert_close(logits(load(path), ids), expected, atol=1e-4, rtol=0)


class ValuesOnly:
    """Attention in which every token sees only itself."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1).flatten(1)


def logits(decoder: Decoder, ids: Tensor) -> Tensor:
    return decoder.logits(decoder(ids, torch.arange(len(ids)), ValuesOnly()))

"""The decoder computes what Hugging Face's transformers computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tfserve.model.decoder import Decoder
from tfserve.model.loading.config import load_model_config
from tfserve.model.loading.loader import load_model
from tfserve.model.models.base import FAMILIES

TINY = [
    *("tiny_llama3", "tiny_qwen25", "tiny_qwen25_untied"),
    *("tiny_qwen3", "tiny_qwen3_untied", "tiny_mistral", "tiny_mistral_window"),
]


class DenseAttention:
    """Causal attention of one sequence, remembering the keys and values of its earlier chunks."""

    def __init__(self) -> None:
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = self._keys[layer] = torch.cat([self._keys[layer], k]) if layer in self._keys else k
        values = self._values[layer] = torch.cat([self._values[layer], v]) if layer in self._values else v
        group = q.shape[1] // k.shape[1]
        scores = torch.einsum("qhd,khd->hqk", q, keys.repeat_interleave(group, 1)) * q.shape[-1] ** -0.5
        hidden = torch.ones(len(q), len(keys), dtype=torch.bool).triu(1 + len(keys) - len(q))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(group, 1)).flatten(1)


def run(decoder: Decoder, ids: Tensor, chunks: list[int]) -> Tensor:
    attention, start, logits = DenseAttention(), 0, []
    for n in chunks:
        positions = torch.arange(start, start + n)
        logits.append(decoder.logits(decoder(ids[start : start + n], positions, attention)))
        start += n
    assert start == len(ids)
    return torch.cat(logits)


def load(path: Path, dtype: str = "float32", quantization: str | None = None) -> Decoder:
    config = load_model_config(path)
    return load_model(path, config, dtype=dtype, device="cpu", quantization=quantization, progress=False)


@torch.inference_mode()
def reference(path: Path, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    return model(ids[None]).logits[0].float()


def test_every_family_has_a_tiny_checkpoint(request: pytest.FixtureRequest) -> None:
    assert {load_model_config(request.getfixturevalue(name)).architecture for name in TINY} == set(FAMILIES)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 512, (200,), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(
    "chunks",
    [[200], [64, 64, 1, 71], [196, 1, 1, 1, 1]],
    ids=["one-shot prefill", "chunked prefill", "prefill then decode"],
)
@pytest.mark.parametrize("name", TINY)
def test_float32_logits_equal_transformers(
    name: str, chunks: list[int], ids: Tensor, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(name)
    expected = reference(path, ids)
    assert expected.std() > 0.3  # logits that say something
    torch.testing.assert_close(run(load(path), ids, chunks), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_is_no_further_off_than_transformers_own(
    name: str, ids: Tensor, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(name)
    exact = reference(path, ids)
    theirs = (reference(path, ids, torch.bfloat16) - exact).pow(2).mean().sqrt()
    ours = (run(load(path, "bfloat16"), ids, [200]) - exact).pow(2).mean().sqrt()
    assert ours < 1.2 * theirs


@pytest.mark.parametrize("name", TINY)
def test_int8_stays_close_to_float32(name: str, ids: Tensor, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(name)
    exact = reference(path, ids)
    error = run(load(path, quantization="int8"), ids, [200]) - exact
    assert error.pow(2).mean().sqrt() < 0.05 * exact.std()

"""Rotary embeddings at any position, at no cost for the positions that are not used."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from tfserve.model.layers.rope import Rotary
from tfserve.model.loading.config import load_model_config

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["tiny_llama3", "tiny_qwen25"])
def test_rotations_equal_transformers_at_near_and_far_positions(name: str, request: pytest.FixtureRequest) -> None:
    from transformers import AutoModelForCausalLM

    path: Path = request.getfixturevalue(name)
    model = AutoModelForCausalLM.from_pretrained(path)
    positions = torch.tensor([0, 1, 5, 1023, 131_071, 1_009_999])
    cos, sin = model.model.rotary_emb(torch.zeros(1), positions[None])
    half = cos.shape[-1] // 2
    rotations = Rotary(load_model_config(path), CPU).at(positions)[:, 0]
    assert torch.equal(rotations.real, cos[0, :, :half])
    assert torch.equal(rotations.imag, sin[0, :, :half])


def test_a_position_turns_alike_whatever_stands_beside_it(tiny_llama3: Path) -> None:
    rotary = Rotary(load_model_config(tiny_llama3), CPU)
    positions = torch.arange(1000, 1077)
    alone = torch.cat([rotary.at(position[None]) for position in positions])
    assert torch.equal(rotary.at(positions), alone)


def test_the_longest_context_takes_no_memory(tiny_llama3: Path) -> None:
    config = msgspec.structs.replace(load_model_config(tiny_llama3), max_position_embeddings=1_010_000)
    rotary = Rotary(config, CPU)
    held = sum(value.nbytes for value in vars(rotary).values() if isinstance(value, Tensor))
    assert held <= 4 * config.head_dim

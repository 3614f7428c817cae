"""Everything here needs an NVIDIA GPU and is skipped without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.conftest import TINY, save_random
from tests.tokenizers import write_tiny_tokenizer

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """Heads of 64, the narrowest that the GPU kernels are built for."""
    config = LlamaConfig(**TINY, head_dim=64, max_position_embeddings=2048, tie_word_embeddings=False)
    return write_tiny_tokenizer(save_random(LlamaForCausalLM, config, tmp_path_factory.mktemp("tiny_gpu")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cuda)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))

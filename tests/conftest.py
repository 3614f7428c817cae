"""Tiny random checkpoints that transformers writes, for every test that needs a model."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

# Two threads on two busy cores wait for each other: the same tests then take fifteen times as long.
torch.set_num_threads(1)

TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # The default of 0.02 makes near-constant logits, which would hide mistakes that parity is meant to find.
    "initializer_range": 0.1,
}


@pytest.fixture
def heeded_signals() -> Iterator[None]:
    """Programs that a test starts heed SIGINT and SIGHUP, which background jobs and nohup's children ignore."""
    ignored = [number for number in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(scope="session")
def tiny_llama3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama 3.1 in small: GQA, llama3 rope scaling, untied head, head_dim unlike hidden / heads; one file."""
    config = LlamaConfig(
        **TINY,
        head_dim=16,
        max_position_embeddings=1024,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        tie_word_embeddings=False,
    )
    return save_random(LlamaForCausalLM, config, tmp_path_factory.mktemp("tiny_llama3"))


@pytest.fixture(scope="session")
def tiny_qwen25(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2.5 in small: QKV bias, tied head; sharded."""
    config = Qwen2Config(**TINY, max_position_embeddings=1024, tie_word_embeddings=True)
    return save_random(Qwen2ForCausalLM, config, tmp_path_factory.mktemp("tiny_qwen25"), max_shard_size="200KB")


@pytest.fixture(scope="session")
def tiny_qwen25_untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2.5 in small: QKV bias, a head of its own; sharded."""
    config = Qwen2Config(**TINY, max_position_embeddings=1024, tie_word_embeddings=False)
    return save_random(Qwen2ForCausalLM, config, tmp_path_factory.mktemp("tiny_qwen25_untied"), max_shard_size="200KB")


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3 in small: norms of q and k, head_dim unlike hidden / heads, tied head; sharded."""
    config = Qwen3Config(**TINY, head_dim=16, max_position_embeddings=1024, tie_word_embeddings=True)
    return save_random(Qwen3ForCausalLM, config, tmp_path_factory.mktemp("tiny_qwen3"), max_shard_size="200KB")


@pytest.fixture(scope="session")
def tiny_qwen3_untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3 in small: norms of q and k beside biases, one KV head, a head of its own."""
    shape = TINY | {"num_key_value_heads": 1}
    config = Qwen3Config(
        **shape, head_dim=16, max_position_embeddings=1024, tie_word_embeddings=False, attention_bias=True
    )
    return save_random(Qwen3ForCausalLM, config, tmp_path_factory.mktemp("tiny_qwen3_untied"))


@pytest.fixture(scope="session")
def tiny_mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mistral in small, as Nemo: head_dim unlike hidden / heads, no sliding window, untied head."""
    config = MistralConfig(
        **TINY, head_dim=16, max_position_embeddings=1024, sliding_window=None, tie_word_embeddings=False
    )
    return save_random(MistralForCausalLM, config, tmp_path_factory.mktemp("tiny_mistral"))


@pytest.fixture(scope="session")
def tiny_mistral_window(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mistral in small, as 7B v0.1: a sliding window of 200 tokens in a context of 1024; tied head."""
    config = MistralConfig(**TINY, max_position_embeddings=1024, sliding_window=200, tie_word_embeddings=True)
    return save_random(MistralForCausalLM, config, tmp_path_factory.mktemp("tiny_mistral_window"))


def save_random(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    model_dir: Path,
    max_shard_size: str = "1GB",
) -> Path:
    """Write a checkpoint with random weights, biases and norms (transformers starts the last two at 0 and 1)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        model = model_class(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
            elif "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(model_dir, max_shard_size=max_shard_size)
    return model_dir

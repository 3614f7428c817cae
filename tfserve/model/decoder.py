"""The decoder of all families: token ids and positions in, hidden states and logits out.

Source: LlamaForCausalLM of transformers. Families (`models/`) differ in biases, norms of q and k, RoPE scaling and tied
embeddings.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from tfserve.model.layers.linear import Linear, WeightFormat
from tfserve.model.layers.norm_and_mlp import MLP, HeadNorm, RMSNorm
from tfserve.model.layers.rope import Rotary, rotate
from tfserve.model.loading.config import ModelConfig


class LayerAttention(Protocol):
    """One step's attention: stores the step's keys and values, and attends to all of each sequence so far."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """From `q [T, heads, D]`, `k` and `v [T, kv_heads, D]` (views, dense in D) to `[T, heads * D]`."""
        ...


class Attention(nn.Module):
    """Grouped-query attention around the step's attention object."""

    def __init__(self, config: ModelConfig, layer: int, fmt: WeightFormat) -> None:
        super().__init__()
        self.layer = layer
        self.num_q, self.num_kv, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.qkv_proj = Linear(config.hidden_size, config.q_size + 2 * config.kv_size, config.qkv_bias, fmt)
        self.qk_norm = HeadNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.o_proj = Linear(config.q_size, config.hidden_size, config.o_bias, fmt)

    def forward(self, x: Tensor, rotations: Tensor, attention: LayerAttention) -> Tensor:
        """From normalised hidden states `[T, H]` to the addend of the residual, `[T, H]`."""
        qkv = self.qkv_proj(x).view(len(x), -1, self.head_dim)  # [T, heads + 2 * kv_heads, D]
        qk, v = qkv.tensor_split((self.num_q + self.num_kv,), dim=1)
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        q, k = rotate(qk, rotations).tensor_split((self.num_q,), dim=1)
        out: Tensor = self.o_proj(attention.attend(self.layer, q, k, v))
        return out


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual."""

    def __init__(self, config: ModelConfig, layer: int, fmt: WeightFormat) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer, fmt)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, fmt)

    def forward(self, residual: Tensor, rotations: Tensor, attention: LayerAttention) -> None:
        """Add this layer's contribution to `residual [T, H]` in place."""
        residual += self.attention(self.input_norm(residual), rotations, attention)
        residual += self.mlp(self.post_attention_norm(residual))


class Decoder(nn.Module):
    """A whole model; `load_model` builds one with its weights."""

    def __init__(self, config: ModelConfig, fmt: WeightFormat) -> None:
        super().__init__()
        self.config = config
        self.dtype, self.device = fmt.dtype, fmt.device
        embeddings = torch.empty(config.vocab_size, config.hidden_size, dtype=fmt.dtype, device="meta")
        self.embed_tokens = embeddings  # replaced by the loader
        self.rotary = Rotary(config, fmt.device)
        self.layers = nn.ModuleList(DecoderLayer(config, layer, fmt) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, fmt=fmt)

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, positions: Tensor, attention: LayerAttention) -> Tensor:
        """Hidden states `[T, H]` in the model's dtype of tokens `input_ids [T]` at `positions [T]` (both int64).

        The tokens may belong to any number of sequences, which only `attention` distinguishes. `logits` applies the
        final norm, because few of the rows need it.
        """
        rotations = self.rotary.at(positions)
        residual = nn.functional.embedding(input_ids, self.embed_tokens)
        for layer in self.layers:
            layer(residual, rotations, attention)
        return residual

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits `[N, vocab]` of `hidden [N, H]`, chosen rows of the result of `forward`."""
        logits: Tensor = self.lm_head(self.norm(hidden))
        return logits.float()

"""Qwen3, dense (0.6B to 32B): Llama with an RMSNorm on each head of q and k before the rotation.

Source: Qwen3ForCausalLM of transformers.
"""

from __future__ import annotations

from tfserve.model.loading.fields import Fields
from tfserve.model.models import llama
from tfserve.model.models.base import Family, ModelConfig, Part, Traits, Weight, register

_HEAD_DIM = 128
"""transformers' default for a missing head_dim."""


def _layer(config: ModelConfig) -> tuple[Weight, ...]:
    norms = (
        Part("self_attn.q_norm", "attn_q_norm", config.head_dim, rotated=True, heads=config.num_attention_heads),
        Part("self_attn.k_norm", "attn_k_norm", config.head_dim, rotated=True, heads=config.num_key_value_heads),
    )
    return (*llama.layer(config), Weight("attention.qk_norm", norms))


def _traits(fields: Fields) -> Traits:
    bias = fields.flag("attention_bias")
    return Traits(qkv_bias=bias, o_bias=bias, qk_norm=True, head_dim=_HEAD_DIM)


register(Family(architecture="Qwen3ForCausalLM", traits=_traits, layer=_layer, gguf="qwen3"))

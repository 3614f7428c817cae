"""Llama 3 and models with its architecture (SmolLM2). Source: LlamaForCausalLM of transformers."""

from __future__ import annotations

from tfserve.model.loading.fields import Fields
from tfserve.model.models.base import Family, ModelConfig, Part, Traits, Weight, register


def layer(config: ModelConfig) -> tuple[Weight, ...]:
    """The weights of a layer; biases where `config` has them."""
    hidden, inner = config.hidden_size, config.intermediate_size
    qkv = (
        Part("self_attn.q_proj", "attn_q", config.q_size, rotated=True),
        Part("self_attn.k_proj", "attn_k", config.kv_size, rotated=True),
        Part("self_attn.v_proj", "attn_v", config.kv_size),
    )
    gate_up = (Part("mlp.gate_proj", "ffn_gate", inner), Part("mlp.up_proj", "ffn_up", inner))
    return (
        Weight("input_norm", (Part("input_layernorm", "attn_norm", hidden),), read_by="attention.qkv_proj"),
        Weight("attention.qkv_proj", qkv, hidden, config.qkv_bias),
        Weight("attention.o_proj", (Part("self_attn.o_proj", "attn_output", hidden),), config.q_size, config.o_bias),
        Weight(
            "post_attention_norm", (Part("post_attention_layernorm", "ffn_norm", hidden),), read_by="mlp.gate_up_proj"
        ),
        Weight("mlp.gate_up_proj", gate_up, hidden, config.mlp_bias),
        Weight("mlp.down_proj", (Part("mlp.down_proj", "ffn_down", hidden),), inner, config.mlp_bias),
    )


def _traits(fields: Fields) -> Traits:
    bias = fields.flag("attention_bias")
    return Traits(qkv_bias=bias, o_bias=bias, mlp_bias=fields.flag("mlp_bias"))


register(Family(architecture="LlamaForCausalLM", traits=_traits, layer=layer, gguf="llama", gguf_pairs=True))

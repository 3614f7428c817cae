"""Qwen2.5: Llama with biases on q, k and v. Source: Qwen2ForCausalLM of transformers."""

from __future__ import annotations

from tfserve.model.loading.fields import Fields
from tfserve.model.models import llama
from tfserve.model.models.base import Family, Traits, register


def _traits(fields: Fields) -> Traits:  # noqa: ARG001
    return Traits(qkv_bias=True)


register(Family(architecture="Qwen2ForCausalLM", traits=_traits, layer=llama.layer, gguf="qwen2"))

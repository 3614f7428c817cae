"""Mistral (7B, Nemo, Small): Llama's weights, and in the oldest a sliding window. In a GGUF file it is a Llama.

Within the window full attention computes the same, so the window is the longest context.
Source: MistralForCausalLM of transformers.
"""

from __future__ import annotations

from tfserve.model.fields import Fields
from tfserve.model.models import llama
from tfserve.model.models.base import Family, Traits, register

_SLIDING_WINDOW = 4096
"""What transformers takes where `sliding_window` is not named at all; null means none."""


def _traits(fields: Fields) -> Traits:
    is_null = "sliding_window" in list(fields) and fields.value("sliding_window") is None
    return Traits(sliding_window=None if is_null else fields.integer("sliding_window", _SLIDING_WINDOW))


register(Family(architecture="MistralForCausalLM", traits=_traits, layer=llama.layer))

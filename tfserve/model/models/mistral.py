"""Mistral (7B, Nemo, Small): Llama's weights; the oldest has a sliding window. GGUF files call it a Llama.

Up to the window's size full attention computes the same, so the window limits the context.
Source: MistralForCausalLM of transformers.
"""

from __future__ import annotations

from tfserve.model.loading.fields import Fields
from tfserve.model.models import llama
from tfserve.model.models.base import Family, Traits, register

_SLIDING_WINDOW = 4096
"""transformers' default if `sliding_window` is missing; null means no window."""


def _traits(fields: Fields) -> Traits:
    is_null = "sliding_window" in list(fields) and fields.value("sliding_window") is None
    return Traits(sliding_window=None if is_null else fields.integer("sliding_window", _SLIDING_WINDOW))


register(Family(architecture="MistralForCausalLM", traits=_traits, layer=llama.layer))

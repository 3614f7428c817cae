"""Hugging Face safetensors into a `Decoder`: merged, permuted, folded and packed as the layers want them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from tfserve.model.checkpoint import Checkpoint
from tfserve.model.config import ModelConfig
from tfserve.model.decoder import Attention, Decoder, DecoderLayer
from tfserve.model.layers import MLP, RMSNorm
from tfserve.model.linear import Linear, WeightFormat
from tfserve.model.rope import interleave_halves


def load_model(
    path: Path, config: ModelConfig, *, dtype: str, device: str, quantization: str | None, progress: bool
) -> Decoder:
    """Build the decoder of the checkpoint in `path`: `model.safetensors`, or shards named by its index.

    `dtype` is "float32", "bfloat16" or "float16"; weights are converted. `quantization="int8"` quantises the linear
    weights at load (CPU, float32). `progress` draws a bar on stderr. Raises ModelError for a checkpoint that is not
    whole or not of this shape, ConfigError for an int8 that this machine cannot compute.
    """
    fmt = WeightFormat.choose(getattr(torch, dtype), torch.device(device), quantization)
    decoder = Decoder(config, fmt)
    with Checkpoint(path) as checkpoint, torch.inference_mode():
        checkpoint.verify(config)
        load = _Load(checkpoint, fmt)
        load.outer(decoder)
        for number, layer in enumerate(tqdm(decoder.layers, "loading weights", unit="layer", disable=not progress)):
            assert isinstance(layer, DecoderLayer)
            load.layer(layer, f"model.layers.{number}.")
    return decoder


class _Load:
    """One pass over a checkpoint; a layer's tensors are converted, handed over and dropped before the next layer's."""

    def __init__(self, checkpoint: Checkpoint, fmt: WeightFormat) -> None:
        self._checkpoint, self._format = checkpoint, fmt

    def outer(self, decoder: Decoder) -> None:
        """Embeddings, last norm and head; a tied head shares the embeddings' memory where its format allows."""
        decoder.embed_tokens = self._get("model.embed_tokens.weight")
        tied = decoder.config.tie_word_embeddings
        head = decoder.embed_tokens if tied else self._get("lm_head.weight")
        decoder.lm_head.load(self._after(decoder.norm, "model.norm.weight", head), None)

    def layer(self, layer: DecoderLayer, prefix: str) -> None:
        """One decoder layer, whose tensors' names start with `prefix`."""
        self._attention(layer.attention, layer.input_norm, prefix)
        self._mlp(layer.mlp, layer.post_attention_norm, prefix)

    def _attention(self, attention: Attention, norm: RMSNorm, prefix: str) -> None:
        def merged(kind: str) -> Tensor:
            q, k, v = (self._get(f"{prefix}self_attn.{x}_proj.{kind}") for x in "qkv")
            return torch.cat([interleave_halves(q, attention.head_dim), interleave_halves(k, attention.head_dim), v])

        self._linear(attention.qkv_proj, merged, norm, f"{prefix}input_layernorm.weight")
        self._linear(attention.o_proj, lambda kind: self._get(f"{prefix}self_attn.o_proj.{kind}"))

    def _mlp(self, mlp: MLP, norm: RMSNorm, prefix: str) -> None:
        def merged(kind: str) -> Tensor:
            return torch.cat([self._get(f"{prefix}mlp.{x}_proj.{kind}") for x in ("gate", "up")])

        self._linear(mlp.gate_up_proj, merged, norm, f"{prefix}post_attention_layernorm.weight")
        self._linear(mlp.down_proj, lambda kind: self._get(f"{prefix}mlp.down_proj.{kind}"))

    def _linear(
        self, linear: Linear, tensor: Callable[[str], Tensor], norm: RMSNorm | None = None, norm_name: str = ""
    ) -> None:
        """Hand `linear` its weight and bias; a `norm` in front of it is folded into the weight, or gets its own."""
        weight = tensor("weight")
        if norm is not None:
            weight = self._after(norm, norm_name, weight)
        linear.load(weight, tensor("bias") if linear.has_bias else None)

    def _after(self, norm: RMSNorm, norm_name: str, weight: Tensor) -> Tensor:
        norm_weight = self._get(norm_name)
        if self._format.folds_norms:
            return norm.fold_into(weight, norm_weight)
        norm.load(norm_weight)
        return weight

    def _get(self, name: str) -> Tensor:
        """A tensor of its own memory, in the model's dtype and on its device."""
        return self._checkpoint.get(name).to(self._format.device, self._format.dtype, copy=True)

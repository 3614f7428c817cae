"""Hugging Face safetensors into a `Decoder`: merged, permuted, smoothed, folded and packed as the layers want."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from tfserve.model.checkpoint import Checkpoint
from tfserve.model.config import ModelConfig
from tfserve.model.decoder import Decoder, DecoderLayer
from tfserve.model.layer_weights import LayerWeights, fill_pair
from tfserve.model.linear import WeightFormat
from tfserve.model.quantized_cache import QuantizedCache
from tfserve.model.rope import interleave_halves
from tfserve.model.smoothing import Smoother, calibration_ids


def load_model(
    path: Path,
    config: ModelConfig,
    *,
    dtype: str,
    device: str,
    quantization: str | None,
    progress: bool,
    quantized_dir: Path | None = None,
) -> Decoder:
    """Build the decoder of the checkpoint in `path`: `model.safetensors`, or shards named by its index.

    `dtype` is "float32", "bfloat16" or "float16"; weights are converted. `quantization="int8"` quantises the linear
    weights (CPU, float32), once a short text has shown which inputs to even out (`Smoother`), and keeps what it made in
    `quantized_dir`, if given, for the next load. `progress` draws a bar on stderr. Raises ModelError for a checkpoint
    that is not whole or not of this shape, ConfigError for an int8 that this machine cannot compute.
    """
    fmt = WeightFormat.choose(getattr(torch, dtype), torch.device(device), quantization)
    with Checkpoint(path) as checkpoint, torch.inference_mode():
        checkpoint.verify(config)  # before anything is as large as the config says
        decoder = Decoder(config, fmt)
        read = _Reader(checkpoint, config, fmt)
        decoder.embed_tokens = read.tensor("model.embed_tokens.weight")
        cache = QuantizedCache(quantized_dir, path) if quantized_dir is not None and fmt.kind == "int8" else None
        if cache is None or not cache.fill(decoder):
            _fill(decoder, read, calibration_ids(path, config.vocab_size) if fmt.kind == "int8" else None, progress)
            if cache is not None:
                cache.save(decoder)
    return decoder


def _fill(decoder: Decoder, read: _Reader, smoothing_text: Tensor | None, progress: bool) -> None:
    """Every norm and linear from the checkpoint; the embeddings are there already."""
    config, fmt = decoder.config, read.format
    smoother = None if smoothing_text is None else Smoother(config, decoder.embed_tokens, smoothing_text)
    for number, layer in enumerate(tqdm(decoder.layers, "loading weights", unit="layer", disable=not progress)):
        assert isinstance(layer, DecoderLayer)
        weights = read.layer(number)
        if smoother is not None:
            smoother.smooth_layer(weights)
        weights.fill(layer, fmt)
    norm = read.tensor("model.norm.weight")
    # A tied head shares the embeddings' memory where its format allows.
    head = decoder.embed_tokens if config.tie_word_embeddings else read.tensor("lm_head.weight")
    if smoother is not None:
        norm, head = smoother.smooth_head(norm, head)
    fill_pair(decoder.norm, norm, decoder.lm_head, head, bias=None, fmt=fmt)


class _Reader:
    """A checkpoint's tensors in the model's dtype, on its device, each in memory of its own."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, fmt: WeightFormat) -> None:
        self._checkpoint, self._config, self.format = checkpoint, config, fmt

    def tensor(self, name: str) -> Tensor:
        return self._checkpoint.get(name).to(self.format.device, self.format.dtype, copy=True)

    def layer(self, number: int) -> LayerWeights:
        config, prefix = self._config, f"model.layers.{number}."

        def merged(block: str, parts: tuple[str, ...], kind: str) -> Tensor:
            tensors = {part: self.tensor(f"{prefix}{block}.{part}_proj.{kind}") for part in parts}
            for part in {"q", "k"} & tensors.keys():
                tensors[part] = interleave_halves(tensors[part], config.head_dim)
            return torch.cat(list(tensors.values())) if len(parts) > 1 else tensors[parts[0]]

        def pair(block: str, parts: tuple[str, ...], has_bias: bool) -> tuple[Tensor, Tensor | None]:
            return merged(block, parts, "weight"), merged(block, parts, "bias") if has_bias else None

        qkv, qkv_bias = pair("self_attn", ("q", "k", "v"), config.qkv_bias)
        o, o_bias = pair("self_attn", ("o",), config.o_bias)
        gate_up, gate_up_bias = pair("mlp", ("gate", "up"), config.mlp_bias)
        down, down_bias = pair("mlp", ("down",), config.mlp_bias)
        return LayerWeights(
            input_norm=self.tensor(f"{prefix}input_layernorm.weight"),
            qkv=qkv,
            qkv_bias=qkv_bias,
            o=o,
            o_bias=o_bias,
            post_attention_norm=self.tensor(f"{prefix}post_attention_layernorm.weight"),
            gate_up=gate_up,
            gate_up_bias=gate_up_bias,
            down=down,
            down_bias=down_bias,
        )

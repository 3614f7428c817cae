"""Loads Hugging Face safetensors into a `Decoder`: merged, permuted, smoothed, folded and packed for the layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from tfserve.model.decoder import Decoder
from tfserve.model.layers.linear import WeightFormat
from tfserve.model.layers.rope import interleave_halves
from tfserve.model.layers.smoothquant import Smoother, calibration_ids
from tfserve.model.loading.checkpoint import Checkpoint
from tfserve.model.loading.quantized_cache import QuantizedCache
from tfserve.model.loading.weights import Tensors, fill
from tfserve.model.models.base import (
    ModelConfig,
    Part,
    Weight,
    embedding_weight,
    head_weights,
    layer_prefix,
    layer_weights,
)


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

    `dtype` is "float32", "bfloat16" or "float16"; weights are converted. `quantization="int8"` smooths the inputs with
    a short text (`Smoother`), quantises the linear weights (CPU, float32), and caches the result in `quantized_dir`, if
    given. `progress` draws a bar on stderr. Raises ModelError for an incomplete checkpoint or wrong shapes, ConfigError
    if this machine cannot compute in int8.
    """
    fmt = WeightFormat.choose(getattr(torch, dtype), torch.device(device), quantization)
    with Checkpoint(path) as checkpoint, torch.inference_mode():
        checkpoint.verify(config)  # before memory is allocated by the sizes in the config
        decoder = Decoder(config, fmt)
        read = _Reader(checkpoint, config, fmt)
        decoder.embed_tokens = read.tensors([embedding_weight(config)])["embed_tokens.weight"]
        cache = QuantizedCache(quantized_dir, path) if quantized_dir is not None and fmt.kind == "int8" else None
        if cache is None or not cache.fill(decoder):
            _fill(decoder, read, calibration_ids(path, config.vocab_size) if fmt.kind == "int8" else None, progress)
            if cache is not None:
                cache.save(decoder)
    return decoder


def _fill(decoder: Decoder, read: _Reader, smoothing_text: Tensor | None, progress: bool) -> None:
    """Load every norm and linear from the checkpoint; the embeddings are loaded already."""
    config, fmt = decoder.config, read.format
    smoother = None if smoothing_text is None else Smoother(config, decoder.embed_tokens, smoothing_text)
    weights = layer_weights(config)
    for number, layer in enumerate(tqdm(decoder.layers, "loading weights", unit="layer", disable=not progress)):
        tensors = read.tensors(weights, layer_prefix(number))
        if smoother is not None:
            smoother.smooth_layer(tensors)
        fill(layer, weights, tensors, fmt)
    norm, head = head_weights(config)
    # A tied head shares the embeddings' memory if its format allows.
    tied = {"lm_head.weight": decoder.embed_tokens}
    tensors = read.tensors([norm]) | (tied if config.tie_word_embeddings else read.tensors([head]))
    if smoother is not None:
        smoother.smooth_head(tensors)
    fill(decoder, (norm, head), tensors, fmt)


class _Reader:
    """Reads a checkpoint's tensors in the model's dtype, to its device, each in its own memory."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, fmt: WeightFormat) -> None:
        self._checkpoint, self._head_dim, self.format = checkpoint, config.head_dim, fmt

    def tensors(self, weights: Sequence[Weight], prefix: str = "") -> Tensors:
        """The tensors for the modules of `weights`; `prefix` is the prefix of the names in the checkpoint."""
        found: Tensors = {}
        for weight in weights:
            for kind in ("weight", "bias") if weight.has_bias else ("weight",):
                parts = [self._part(part, f"{prefix}{part.name}.{kind}") for part in weight.parts]
                found[f"{weight.module}.{kind}"] = torch.cat(parts) if len(parts) > 1 else parts[0]
        return found

    def _part(self, part: Part, name: str) -> Tensor:
        tensor = self._checkpoint.get(name).to(self.format.device, self.format.dtype, copy=True)
        if part.rotated:
            tensor = interleave_halves(tensor, self._head_dim)
        return tensor if part.heads is None else tensor.expand(part.heads, -1)

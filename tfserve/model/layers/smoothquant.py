"""SmoothQuant: evens out the inputs of int8 linears before they are rounded, without cost per step.

A few channels of a linear's input are much larger than the rest. A row is rounded to 256 steps of its largest value, so
small channels lose precision. Dividing each channel by a factor and multiplying the weight's column by it gives the
same product, and moves part of the difference into the weight, which has a scale per row. The division is free: the
factors are folded into the norm or linear before. Source: Xiao et al., 2022, "SmoothQuant", for int8 weights and
inputs.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tfserve.model.decoder import DecoderLayer
from tfserve.model.layers.linear import Linear, WeightFormat
from tfserve.model.layers.rope import Rotary
from tfserve.model.loading.weights import Tensors, fill
from tfserve.model.models.base import ModelConfig, layer_weights
from tfserve.model.text.tokenizer import Tokenizer


class Smoother:
    """Runs a text through the float32 layers, one after the other, and smooths each before it is quantised."""

    def __init__(self, config: ModelConfig, embeddings: Tensor, token_ids: Tensor) -> None:
        """`embeddings [vocab, H]` float32 on the CPU; the text is `token_ids [T]` int64."""
        self._config, self._weights = config, layer_weights(config)
        self._format = WeightFormat("plain", torch.float32, torch.device("cpu"))
        self._residual = nn.functional.embedding(token_ids, embeddings)
        self._rotations = Rotary(config, self._format.device).at(torch.arange(len(token_ids)))

    def smooth_layer(self, tensors: Tensors) -> None:
        """Fold factors into the next layer's `tensors`, in place; call it once for each layer, in order."""
        config, peaks = self._config, self._run(tensors)
        qkv, gate_up = tensors["attention.qkv_proj.weight"], tensors["mlp.gate_up_proj.weight"]
        o, down = tensors["attention.o_proj.weight"], tensors["mlp.down_proj.weight"]
        v_rows, up_rows = slice(config.q_size + config.kv_size, None), slice(config.intermediate_size, None)

        # One channel of v is the same channel of each query head of its group: these share a factor.
        groups = (config.num_key_value_heads, -1, config.head_dim)
        peak = peaks["attention.o_proj"]
        shared = smoothing_factors(*(x.view(groups).amax(dim=1) for x in (peak, column_peaks(o))))
        o *= shared[:, None].expand(peak.view(groups).shape).flatten()
        qkv[v_rows] /= shared.flatten()[:, None]
        if (bias := tensors.get("attention.qkv_proj.bias")) is not None:
            bias[v_rows] /= shared.flatten()

        factors = smoothing_factors(peaks["mlp.down_proj"], column_peaks(down))
        _move(factors, gate_up[up_rows], down)
        if (bias := tensors.get("mlp.gate_up_proj.bias")) is not None:
            bias[up_rows] /= factors

        # Rows first: the factors of the linears after the norms depend on the sizes of their rows.
        for weight in self._weights:
            if weight.read_by is not None:
                read = tensors[f"{weight.read_by}.weight"]
                _move(
                    smoothing_factors(peaks[weight.read_by], column_peaks(read)),
                    tensors[f"{weight.module}.weight"],
                    read,
                )

    def smooth_head(self, tensors: Tensors) -> None:
        """Fold factors into the last norm and the head; both get new tensors."""
        norm, head = tensors["norm.weight"], tensors["lm_head.weight"]
        peaks = nn.functional.rms_norm(self._residual, norm.shape, norm, self._config.rms_norm_eps).abs().amax(dim=0)
        factors = smoothing_factors(peaks, column_peaks(head))
        tensors |= {"norm.weight": norm / factors, "lm_head.weight": head * factors}

    def _run(self, tensors: Tensors) -> dict[str, Tensor]:
        """Run the text through a layer. Returns the largest size `[in]` of each linear's input channels, by path."""
        layer = DecoderLayer(self._config, 0, self._format)
        fill(layer, self._weights, tensors, self._format)
        peaks: dict[str, Tensor] = {}
        for path, module in layer.named_modules():
            if isinstance(module, Linear):
                module.register_forward_pre_hook(partial(_note_peaks, peaks, path))
        layer(self._residual, self._rotations, _OneSequence())
        return peaks


def column_peaks(weight: Tensor) -> Tensor:
    """Largest size `[in]` in each column of `weight [out, in]`, relative to the largest in its row.

    Each row is quantised with its own scale, so only sizes relative to the row matter.
    """
    sizes = weight.abs()
    return (sizes / sizes.amax(dim=1, keepdim=True).clamp(min=_TINY)).amax(dim=0)


def smoothing_factors(input_peaks: Tensor, weight_peaks: Tensor) -> Tensor:
    """The divisor of each input channel, from its largest size and that of its weight column (any one shape)."""
    return input_peaks.clamp(min=_TINY) ** _ALPHA / weight_peaks.clamp(min=_TINY) ** (1 - _ALPHA)


_TINY = 1e-5  # for a channel without input in this text, or with zero weights
_ALPHA = 0.5
"""Share of the inputs' unevenness that moves into the weights: 0 none, 1 all."""


def calibration_ids(model_dir: Path, vocab_size: int) -> Tensor:
    """Token ids `[T]` of a short mixed text; random ones for a checkpoint without a tokenizer."""
    if not any((model_dir / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return torch.randint(vocab_size, (256,), generator=torch.Generator().manual_seed(0))
    ids = torch.tensor(Tokenizer.from_dir(model_dir).encode(_TEXT))
    return ids[ids < vocab_size]


def _move(factors: Tensor, made_by: Tensor, read_by: Tensor) -> None:
    """Divide outputs of a norm or linear by the factors, multiply the next linear's columns by them; in place."""
    made_by /= factors if made_by.ndim == 1 else factors[:, None]
    read_by *= factors


def _note_peaks(peaks: dict[str, Tensor], name: str, module: nn.Module, inputs: tuple[Tensor]) -> None:  # noqa: ARG001
    peaks[name] = inputs[0].abs().amax(dim=0)


class _OneSequence:
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ARG002
        group = q.shape[1] // k.shape[1]
        keys, values = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
        out = nn.functional.scaled_dot_product_attention(q.transpose(0, 1), keys, values, is_causal=True)
        return out.transpose(0, 1).flatten(1)


_TEXT = """\
The lighthouse keeper wrote in his diary every evening, even when nothing had happened. On the 14th of March, 1887, \
he noted "wind from the north-west, sea rough, two ships seen"; a week later, only: "Fog."

def moving_average(values: list[float], width: int = 3) -> list[float]:
    return [sum(values[i : i + width]) / width for i in range(len(values) - width + 1)]

User: What's the difference between weather and climate? Please answer in two sentences.
Assistant: Weather is the state of the air at one place and time, such as rain in Lisbon this afternoon. Climate is \
what that weather is like on average over 30 years or more.

To make pancakes: 1) whisk 2 eggs with 300 ml of milk; 2) add 150 g of flour, a pinch of salt, and sugar; 3) fry in \
butter until golden. {"id": 7, "ok": true, "tags": ["a", "b"], "price": 19.99}
Solve 3x + 5 = 20, so x = (20 - 5) / 3 = 5. Die Katze schläft. Où est la gare?
"""

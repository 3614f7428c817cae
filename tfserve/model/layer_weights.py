"""One decoder layer's tensors between the checkpoint and the modules: merged, permuted, not yet packed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tfserve.model.decoder import DecoderLayer
from tfserve.model.layers import RMSNorm
from tfserve.model.linear import Linear, WeightFormat


@dataclass(slots=True)
class LayerWeights:
    """A layer's tensors as its modules take them, rows of q and k interleaved; a bias is None where there is none."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    post_attention_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None

    def fill(self, layer: DecoderLayer, fmt: WeightFormat) -> None:
        """Give the modules of `layer`, made for `fmt`, their tensors."""
        attention, mlp = layer.attention, layer.mlp
        fill_pair(layer.input_norm, self.input_norm, attention.qkv_proj, self.qkv, bias=self.qkv_bias, fmt=fmt)
        attention.o_proj.load(self.o, self.o_bias)
        fill_pair(
            layer.post_attention_norm,
            self.post_attention_norm,
            mlp.gate_up_proj,
            self.gate_up,
            bias=self.gate_up_bias,
            fmt=fmt,
        )
        mlp.down_proj.load(self.down, self.down_bias)


def fill_pair(
    norm: RMSNorm, norm_weight: Tensor, linear: Linear, weight: Tensor, *, bias: Tensor | None, fmt: WeightFormat
) -> None:
    """A norm and the linear that reads it: the norm's weight is folded into the linear's, or gets to the norm."""
    if fmt.folds_norms:
        weight = norm.fold_into(weight, norm_weight)
    else:
        norm.load(norm_weight)
    linear.load(weight, bias)

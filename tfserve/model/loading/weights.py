"""Tensors between the checkpoint and the decoder's modules: merged, permuted, not yet packed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from tfserve.model.layers.linear import Linear, WeightFormat
from tfserve.model.layers.norm_and_mlp import RMSNorm
from tfserve.model.models.base import Weight

Tensors = dict[str, Tensor]
"""By the module's path and `.weight` or `.bias`, in the modules' layout: rows of q and k interleaved."""


def fill(parent: nn.Module, weights: Sequence[Weight], tensors: Tensors, fmt: WeightFormat) -> None:
    """Load the modules of `parent`, which have format `fmt`; a norm's weight may be folded into the next linear's."""
    tensors = dict(tensors)
    for weight in weights:
        module, tensor = parent.get_submodule(weight.module), tensors[f"{weight.module}.weight"]
        if isinstance(module, Linear):
            module.load(tensor, tensors.get(f"{weight.module}.bias"))
            continue
        assert isinstance(module, RMSNorm)
        if fmt.folds_norms and weight.read_by is not None:
            reader = f"{weight.read_by}.weight"
            tensors[reader] = module.fold_into(tensors[reader], tensor)
        else:
            module.load(tensor)

"""The definition of a model family: how it reads `config.json`, and its weights, each named once. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import msgspec

from tfserve.model.loading.fields import Fields

DTypeName = Literal["float32", "bfloat16", "float16"]


class Llama3RopeScaling(msgspec.Struct, frozen=True):
    """RoPE scaling of Llama 3.1 and later: lowers the slow frequencies for contexts beyond the trained one."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of a decoder; fields have Hugging Face's names where they exist.

    `dtype` is that of the checkpoint's weights. `eos_token_ids` are those of `config.json`, then those of
    `generation_config.json`; the tokenizer may name one more (`Tokenizer.eos_token_ids`). `max_position_embeddings` is
    the model's longest context in tokens, at most its `sliding_window`, if it has one.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    sliding_window: int | None = None
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3RopeScaling | None
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool = False
    eos_token_ids: tuple[int, ...]
    dtype: DTypeName

    @property
    def q_size(self) -> int:
        """Width of a token's queries over all heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of a token's keys (or values) over all KV heads."""
        return self.num_key_value_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Weights and biases in the checkpoint; a tied head counts once."""
        return sum({tensor.name: math.prod(tensor.shape) for tensor in stored_tensors(self)}.values())


class Part(msgspec.Struct, frozen=True):
    """A tensor of the checkpoint: its names there and in GGUF files, without prefix and `.weight`, and its rows.

    `rotated`: the rows are heads that RoPE rotates. `heads` is the number of heads that share this norm's weight.
    """

    name: str
    gguf: str
    rows: int
    rotated: bool = False
    heads: int | None = None


class Weight(msgspec.Struct, frozen=True):
    """The weight of one module of the decoder: `parts`, stacked by rows; `columns` is None for a norm's weight.

    `module` is the module's path in the decoder, or in its layer. A norm's weight can be folded into the linear
    `read_by`.
    """

    module: str
    parts: tuple[Part, ...]
    columns: int | None = None
    has_bias: bool = False
    read_by: str | None = None


class Traits(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that a family adds to the common ones of `config.json`.

    `head_dim` is the default of a missing one; None: hidden_size / number of heads. `sliding_window` is the number of
    tokens that a token attends to, itself included; None: all before it.
    """

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    sliding_window: int | None = None


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """One architecture, by its class in transformers.

    `traits` reads `config.json`, and raises ModelError by name for unsupported values. `layer` lists the weights of a
    decoder layer. `gguf` is the architecture's name in GGUF files, None without its own; `gguf_pairs`: llama.cpp stores
    rows of q and k with rotated pairs as neighbours.
    """

    architecture: str
    traits: Callable[[Fields], Traits]
    layer: Callable[[ModelConfig], tuple[Weight, ...]]
    gguf: str | None = None
    gguf_pairs: bool = False


FAMILIES: dict[str, Family] = {}
"""By the class name in transformers."""


def register(family: Family) -> None:
    """Register `family`. ValueError for a class, or a name in GGUF files, that another family has."""
    for other in FAMILIES.values():
        if family.architecture == other.architecture or (family.gguf is not None and family.gguf == other.gguf):
            raise ValueError(f"two families have the class {other.architecture} or the GGUF name {other.gguf}")
    FAMILIES[family.architecture] = family


def layer_weights(config: ModelConfig) -> tuple[Weight, ...]:
    """The weights of each decoder layer; a norm comes before the linear that reads it."""
    return FAMILIES[config.architecture].layer(config)


def embedding_weight(config: ModelConfig) -> Weight:
    """The token embeddings."""
    return Weight("embed_tokens", (Part("model.embed_tokens", "token_embd", config.vocab_size),), config.hidden_size)


def head_weights(config: ModelConfig) -> tuple[Weight, ...]:
    """The weights after the layers; a tied head is the embeddings again."""
    head = Part("lm_head", "output", config.vocab_size)
    parts = embedding_weight(config).parts if config.tie_word_embeddings else (head,)
    return (
        Weight("norm", (Part("model.norm", "output_norm", config.hidden_size),), read_by="lm_head"),
        Weight("lm_head", parts, config.hidden_size),
    )


class StoredTensor(NamedTuple):
    """A tensor that a checkpoint must contain; `gguf` is its name in a GGUF file."""

    name: str
    gguf: str
    shape: tuple[int, ...]
    rotated: bool


def layer_prefix(layer: int) -> str:
    """Prefix of the names of a layer's tensors."""
    return f"model.layers.{layer}."


def stored_tensors(config: ModelConfig) -> Iterator[StoredTensor]:
    """Every tensor that a checkpoint of `config` must contain; a tied head's is listed twice."""
    yield from _stored((embedding_weight(config), *head_weights(config)), "", "")
    weights = layer_weights(config)
    for layer in range(config.num_hidden_layers):
        yield from _stored(weights, layer_prefix(layer), f"blk.{layer}.")


def _stored(weights: tuple[Weight, ...], prefix: str, gguf_prefix: str) -> Iterator[StoredTensor]:
    for weight in weights:
        for part in weight.parts:
            name, gguf = prefix + part.name, gguf_prefix + part.gguf
            shape = (part.rows,) if weight.columns is None else (part.rows, weight.columns)
            yield StoredTensor(f"{name}.weight", f"{gguf}.weight", shape, part.rotated)
            if weight.has_bias:
                yield StoredTensor(f"{name}.bias", f"{gguf}.bias", (part.rows,), part.rotated)

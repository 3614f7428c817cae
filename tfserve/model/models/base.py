"""What a model family says of itself: how it reads `config.json`, and its weights, each named once. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import msgspec

from tfserve.model.fields import Fields

DTypeName = Literal["float32", "bfloat16", "float16"]


class Llama3RopeScaling(msgspec.Struct, frozen=True):
    """How Llama 3.1 and later stretch the slow rotary frequencies past the context they were trained on."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of a decoder; names are Hugging Face's where they have one.

    `dtype` is what the checkpoint says its weights are. `eos_token_ids` are those of `config.json`, then what
    `generation_config.json` adds; the tokenizer may name one more (`Tokenizer.eos_token_ids`).
    `max_position_embeddings` is the longest context that the model was made for, in tokens, and no more than its
    `sliding_window`, where it has one.
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
    """A tensor of the checkpoint: its name there and in a GGUF file, without prefix and `.weight`, and its rows.

    `rotated` rows are heads that rotary embedding turns. `heads` is how many heads have this one norm's weight.
    """

    name: str
    gguf: str
    rows: int
    rotated: bool = False
    heads: int | None = None


class Weight(msgspec.Struct, frozen=True):
    """What one module of the decoder holds: `parts`, one below the other; `columns` is None for the weight of a norm.

    `module` is the module's path in the decoder, or in its layer. `read_by` is the linear that a norm's weight can be
    folded into.
    """

    module: str
    parts: tuple[Part, ...]
    columns: int | None = None
    has_bias: bool = False
    read_by: str | None = None


class Traits(msgspec.Struct, frozen=True, kw_only=True):
    """What a family reads out of `config.json` beyond what all have.

    `head_dim` is what a missing one means, None: hidden_size over the heads. `sliding_window` is how many tokens a
    token sees, itself included, None: all before it.
    """

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    sliding_window: int | None = None


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """One architecture, by its class in transformers.

    `traits` reads `config.json`, and raises ModelError by name for what would be computed wrongly. `layer` names the
    weights of one decoder layer. `gguf` is the architecture in GGUF files, None if it has none of its own;
    `gguf_pairs`: llama.cpp stores the rows of q and k so that rotated pairs are neighbours.
    """

    architecture: str
    traits: Callable[[Fields], Traits]
    layer: Callable[[ModelConfig], tuple[Weight, ...]]
    gguf: str | None = None
    gguf_pairs: bool = False


FAMILIES: dict[str, Family] = {}
"""By the name of the class in transformers."""


def register(family: Family) -> None:
    """Add `family` to the families that are served."""
    FAMILIES[family.architecture] = family


def layer_weights(config: ModelConfig) -> tuple[Weight, ...]:
    """What each decoder layer holds; a norm comes before the linear that reads it."""
    return FAMILIES[config.architecture].layer(config)


def embedding_weight(config: ModelConfig) -> Weight:
    """The token embeddings."""
    return Weight("embed_tokens", (Part("model.embed_tokens", "token_embd", config.vocab_size),), config.hidden_size)


def head_weights(config: ModelConfig) -> tuple[Weight, ...]:
    """What follows the layers; a tied head is the embeddings again."""
    head = Part("lm_head", "output", config.vocab_size)
    parts = embedding_weight(config).parts if config.tie_word_embeddings else (head,)
    return (
        Weight("norm", (Part("model.norm", "output_norm", config.hidden_size),), read_by="lm_head"),
        Weight("lm_head", parts, config.hidden_size),
    )


class StoredTensor(NamedTuple):
    """A tensor as a checkpoint must hold it; `gguf` is its name in a GGUF file."""

    name: str
    gguf: str
    shape: tuple[int, ...]
    rotated: bool


def layer_prefix(layer: int) -> str:
    """What the names of a layer's tensors begin with."""
    return f"model.layers.{layer}."


def stored_tensors(config: ModelConfig) -> Iterator[StoredTensor]:
    """Every tensor that a checkpoint of `config` must hold; a tied head's comes twice."""
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

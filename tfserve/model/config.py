"""What a checkpoint's `config.json` says about the model, in one spelling. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from tfserve.errors import ModelError

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM")
SUPPORTED_ROPE_TYPES = ("default", "llama3")

DTypeName = Literal["float32", "bfloat16", "float16"]


class Llama3RopeScaling(msgspec.Struct, frozen=True):
    """How Llama 3.1 and later stretch the slow rotary frequencies past the context they were trained on."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of a Llama 3 or Qwen2.5 decoder; names are Hugging Face's where they have one.

    `dtype` is what the checkpoint says its weights are. `eos_token_ids` are those of `config.json`, then what
    `generation_config.json` adds. `max_position_embeddings` is the longest context the model was made for, in tokens.
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
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3RopeScaling | None
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
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
        hidden, inter, qkv = self.hidden_size, self.intermediate_size, self.q_size + 2 * self.kv_size
        layer = hidden * (qkv + self.q_size + 3 * inter + 2)
        layer += qkv * self.qkv_bias + hidden * self.o_bias + (2 * inter + hidden) * self.mlp_bias
        embeddings = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * layer + hidden


def load_model_config(model_dir: Path) -> ModelConfig:
    """Read `config.json` (and `generation_config.json`, where there is one) of a Hugging Face checkpoint directory.

    Raises ModelError for a missing or broken file, and for a model this server would compute wrongly.
    """
    path = model_dir / "config.json"
    if not path.is_file():
        raise ModelError(
            f"no config.json in {model_dir}: give a checkpoint directory in Hugging Face format "
            "(config.json, *.safetensors, tokenizer.json)"
        )
    reader = _Reader(_read_json(path), path)
    _reject_unsupported(reader)

    architecture = reader.architecture()
    is_qwen2 = architecture == "Qwen2ForCausalLM"
    attention_bias = reader.flag("attention_bias") and not is_qwen2
    hidden_size = reader.integer("hidden_size")
    num_heads = reader.integer("num_attention_heads")
    num_kv_heads = reader.integer("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise reader.error(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
    head_dim = reader.integer("head_dim", default=hidden_size // num_heads)
    if head_dim % 2:
        raise reader.error(f"head_dim must be even for rotary embeddings, got {head_dim}")
    theta, scaling = reader.rope()
    generation = model_dir / "generation_config.json"
    return ModelConfig(
        architecture=architecture,
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.integer("intermediate_size"),
        num_hidden_layers=reader.integer("num_hidden_layers"),
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=reader.integer("max_position_embeddings"),
        rms_norm_eps=reader.number("rms_norm_eps", default=1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        qkv_bias=is_qwen2 or attention_bias,
        o_bias=attention_bias,
        mlp_bias=reader.flag("mlp_bias") and not is_qwen2,
        eos_token_ids=reader.eos_token_ids(_read_json(generation) if generation.is_file() else {}),
        bos_token_id=reader.fields.get("bos_token_id"),
        dtype=reader.dtype(),
    )


def _reject_unsupported(reader: _Reader) -> None:
    """Settings that change what the model computes and that the decoder does not know."""
    if reader.flag("use_sliding_window"):
        raise reader.error("use_sliding_window is true; only full attention is supported")
    activation = reader.fields.get("hidden_act", "silu")
    if activation != "silu":
        raise reader.error(f"hidden_act is {activation!r}; only 'silu' is supported")
    quantization = reader.fields.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "?") if isinstance(quantization, Mapping) else quantization
        raise reader.error(
            f"the weights are quantised ({method}); give the unquantised checkpoint (int8 is made at load)"
        )


class _Reader:
    """Typed access to config.json; every complaint names the file and the key."""

    def __init__(self, fields: dict[str, Any], path: Path) -> None:
        self.fields = fields
        self._path = path

    def error(self, message: str) -> ModelError:
        return ModelError(f"{self._path}: {message}")

    def architecture(self) -> str:
        found = self.fields.get("architectures") or []
        for name in found:
            if name in SUPPORTED_ARCHITECTURES:
                return str(name)
        named = ", ".join(map(str, found)) or f"none (model_type {self.fields.get('model_type')!r})"
        raise self.error(f"unsupported architecture {named}; supported: {', '.join(SUPPORTED_ARCHITECTURES)}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(f"{key} must be a positive integer, got {value!r}")
        return value

    def number(self, key: str, default: float | None = None, within: Mapping[str, Any] | None = None) -> float:
        value = self._get(key, default, within)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.error(f"{key} must be a positive number, got {value!r}")
        return float(value)

    def flag(self, key: str) -> bool:
        return bool(self.fields.get(key, False))

    def rope(self) -> tuple[float, Llama3RopeScaling | None]:
        """Base and scaling: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""
        rope = self.fields.get("rope_parameters") or self.fields.get("rope_scaling") or {}
        theta = self.number("rope_theta", default=self.fields.get("rope_theta", 10000.0), within=rope)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in SUPPORTED_ROPE_TYPES:
            raise self.error(f"rope type {kind!r} is not supported; supported: {', '.join(SUPPORTED_ROPE_TYPES)}")
        for holder in (rope, self.fields):
            if holder.get("partial_rotary_factor", 1.0) != 1.0:
                raise self.error("partial_rotary_factor other than 1 is not supported")
        if kind == "default":
            return theta, None
        trained = rope.get("original_max_position_embeddings") or self.integer("max_position_embeddings")
        return theta, Llama3RopeScaling(
            factor=self.number("factor", within=rope),
            low_freq_factor=self.number("low_freq_factor", within=rope),
            high_freq_factor=self.number("high_freq_factor", within=rope),
            original_max_position_embeddings=int(trained),
        )

    def eos_token_ids(self, generation: Mapping[str, Any]) -> tuple[int, ...]:
        ids: list[int] = []
        for source in (self.fields, generation):
            value = source.get("eos_token_id")
            ids += value if isinstance(value, list) else [] if value is None else [value]
        return tuple(dict.fromkeys(ids))

    def dtype(self) -> DTypeName:
        name = str(self.fields.get("dtype") or self.fields.get("torch_dtype") or "float32").removeprefix("torch.")
        try:
            dtype: DTypeName = msgspec.convert(name, DTypeName)
        except msgspec.ValidationError:
            raise self.error(f"dtype {name!r} is not supported; supported: float32, bfloat16, float16") from None
        return dtype

    def _get(self, key: str, default: Any, within: Mapping[str, Any] | None = None) -> Any:
        value = (self.fields if within is None else within).get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(f"{key} is missing")
        return value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}); download or convert the checkpoint again") from None
    if not isinstance(fields, dict):
        raise ModelError(f"{path} must hold a JSON object, got {type(fields).__name__}")
    return fields

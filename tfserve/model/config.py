"""What a checkpoint's `config.json` says about the model, in one spelling. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from tfserve.errors import ModelError
from tfserve.model.fields import Fields, is_absent, one_line, read_fields, shown

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM")
SUPPORTED_ROPE_TYPES = ("default", "llama3")

_QUANTISATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""What GPTQ, AWQ and ModelOpt tools write beside weights of theirs; not all of them write it into config.json too."""

MOST = {
    "vocab_size": 2**22,
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2048,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 8192,
    "max_position_embeddings": 2**30,
}
"""Largest sizes of a model: some ten times those of the largest there are, so that none costs memory before the weights
have been held against it."""

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
    `generation_config.json` adds; the tokenizer may name one more (`Tokenizer.eos_token_ids`).
    `max_position_embeddings` is the longest context the model was made for, in tokens.
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
    fields = read_fields(path)
    generation = read_fields(model_dir / "generation_config.json", optional=True)
    _reject_unsupported(fields)
    _reject_quantised(fields, model_dir)

    architecture = _architecture(fields)
    is_qwen2 = architecture == "Qwen2ForCausalLM"
    attention_bias = fields.flag("attention_bias") and not is_qwen2
    vocab_size = _size(fields, "vocab_size")
    hidden_size = _size(fields, "hidden_size")
    num_heads = _size(fields, "num_attention_heads")
    num_kv_heads = _size(fields, "num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise fields.error(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
    head_dim = _size(fields, "head_dim", default=hidden_size // num_heads)
    if head_dim % 2:
        raise fields.error(f"head_dim must be even for rotary embeddings, got {head_dim}")
    theta, scaling = _rope(fields)
    eos = fields.token_ids("eos_token_id", vocab_size) + generation.token_ids("eos_token_id", vocab_size)
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=_size(fields, "intermediate_size"),
        num_hidden_layers=_size(fields, "num_hidden_layers"),
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=_size(fields, "max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=is_qwen2 or attention_bias,
        o_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias") and not is_qwen2,
        eos_token_ids=tuple(dict.fromkeys(eos)),
        dtype=_dtype(fields),
    )


def _size(fields: Fields, key: str, default: int | None = None) -> int:
    return fields.integer(key, default, most=MOST[key])


def _architecture(fields: Fields) -> str:
    found = fields.texts("architectures", [])
    for name in found:
        if name in SUPPORTED_ARCHITECTURES:
            return name
    named = one_line(", ".join(found)) if found else f"none (model_type {shown(fields.value('model_type'))})"
    raise fields.error(f"unsupported architecture {named}; supported: {', '.join(SUPPORTED_ARCHITECTURES)}")


def _reject_unsupported(fields: Fields) -> None:
    """Settings that change what the model computes and that the decoder does not know."""
    if fields.flag("use_sliding_window"):
        raise fields.error("use_sliding_window is true; only full attention is supported")
    if other := set(fields.texts("layer_types", [])) - {"full_attention"}:
        raise fields.error(f"layer_types names {shown(min(other))}; only full_attention is supported")
    activation = fields.value("hidden_act") if "hidden_act" in fields else "silu"
    if activation != "silu":
        raise fields.error(f"hidden_act is {shown(activation)}; only 'silu' is supported")


def _reject_quantised(fields: Fields, model_dir: Path) -> None:
    """Weights that are not floats, by what the export says about itself; the rest is `Checkpoint.verify`'s."""
    give = "give the unquantised checkpoint (int8 is made at load)"
    for key in ("quantization_config", "compression_config"):
        if said := fields.value(key):
            method = said.get("quant_method", "?") if isinstance(said, dict) else said
            raise fields.error(f"{key}: the weights are quantised ({one_line(str(method))}); {give}")
    for name in _QUANTISATION_FILES:
        if not is_absent(model_dir / name):
            raise ModelError(
                f"{model_dir / name}: the weights are quantised; {give}, or remove this file if they are not"
            )


def _rope(fields: Fields) -> tuple[float, Llama3RopeScaling | None]:
    """Base and scaling: `rope_scaling`, or else `rope_parameters`, as transformers 5 reads them.

    An object that is given as `rope_scaling` replaces `rope_parameters`; each may hold `rope_theta`, and one beside
    them is used where neither does.
    """
    given, added = fields.section("rope_parameters"), fields.section("rope_scaling")
    rope = added if fields.value("rope_scaling") else given
    name = "rope_scaling" if rope is added else "rope_parameters"
    kind = rope.value("rope_type" if "rope_type" in rope else "type") or "default"
    if kind not in SUPPORTED_ROPE_TYPES:
        raise fields.error(
            f"{name}: rope type {shown(kind)} is not supported; supported: {', '.join(SUPPORTED_ROPE_TYPES)}"
        )
    if nested := [key for key in rope if isinstance(rope.value(key), dict)]:
        raise fields.error(f"{name}.{nested[0]}: rotary embeddings by layer type are not supported")
    for holder in (rope, fields):
        if holder.number("partial_rotary_factor", default=1.0) != 1.0:
            raise holder.error("partial_rotary_factor other than 1 is not supported")
    if rope is added and "rope_theta" in given and not ("rope_theta" in added or "rope_theta" in fields):
        raise fields.error(
            "rope_scaling replaces rope_parameters, whose rope_theta would be lost; add rope_theta to rope_scaling"
        )
    theta = rope.number("rope_theta", default=fields.number("rope_theta", default=10000.0))
    if kind == "default":
        if "factor" in rope:
            raise rope.error("factor needs a rope_type that scales; supported: llama3")
        return theta, None
    scaling = Llama3RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=rope.integer(
            "original_max_position_embeddings", default=fields.integer("max_position_embeddings")
        ),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise rope.error(f"high_freq_factor must be above low_freq_factor, got {scaling.high_freq_factor:g}")
    return theta, scaling


def _dtype(fields: Fields) -> DTypeName:
    key = "dtype" if "dtype" in fields else "torch_dtype"
    name = fields.text(key, default="float32").removeprefix("torch.")
    try:
        dtype: DTypeName = msgspec.convert(name, DTypeName)
    except msgspec.ValidationError:
        raise fields.error(
            f"{key}: dtype {shown(name)} is not supported; supported: float32, bfloat16, float16"
        ) from None
    return dtype

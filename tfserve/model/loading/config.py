"""Reads a checkpoint's `config.json` into a ModelConfig. Torch-free."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tfserve.errors import ModelError
from tfserve.model.loading.fields import Fields, is_absent, one_line, read_fields, shown
from tfserve.model.models.base import FAMILIES, DTypeName, Llama3RopeScaling, ModelConfig

__all__ = ["MAX_SIZES", "Llama3RopeScaling", "ModelConfig", "load_model_config", "read_model_config"]

SUPPORTED_ROPE_TYPES = ("default", "llama3")

_QUANTISATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files that GPTQ, AWQ and ModelOpt tools write beside their weights; not all of them also write to config.json."""

MAX_SIZES = {
    "vocab_size": 2**22,
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2048,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 8192,
    "max_position_embeddings": 2**30,
}
"""Largest sizes of a model, about ten times those of known ones: bounds the memory before the weights are checked."""


def load_model_config(model_dir: Path) -> ModelConfig:
    """Read `config.json` (and `generation_config.json`, where there is one) of a Hugging Face checkpoint directory.

    Raises ModelError for a missing or broken file, and for a model that the decoder does not support.
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
    return read_model_config(fields, generation)


def read_model_config(fields: Fields, generation: Fields) -> ModelConfig:
    """The ModelConfig from the contents of `config.json` and `generation_config.json`. Raises ModelError by key."""
    architecture = _architecture(fields)
    traits = FAMILIES[architecture].traits(fields)
    vocab_size = _size(fields, "vocab_size")
    hidden_size = _size(fields, "hidden_size")
    num_heads = _size(fields, "num_attention_heads")
    num_kv_heads = _size(fields, "num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise fields.error(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
    head_dim = _size(fields, "head_dim", default=traits.head_dim or hidden_size // num_heads)
    if head_dim % 2:
        raise fields.error(f"head_dim must be even for rotary embeddings, got {head_dim}")
    most_tokens = _size(fields, "max_position_embeddings")
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
        max_position_embeddings=min(most_tokens, traits.sliding_window or most_tokens),
        sliding_window=traits.sliding_window,
        rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=traits.qkv_bias,
        o_bias=traits.o_bias,
        mlp_bias=traits.mlp_bias,
        qk_norm=traits.qk_norm,
        eos_token_ids=tuple(dict.fromkeys(eos)),
        dtype=_dtype(fields),
    )


def _size(fields: Fields, key: str, default: int | None = None) -> int:
    return fields.integer(key, default, most=MAX_SIZES[key])


def _architecture(fields: Fields) -> str:
    found = fields.texts("architectures", [])
    for name in found:
        if name in FAMILIES:
            return name
    named = one_line(", ".join(found)) if found else f"none (model_type {shown(fields.value('model_type'))})"
    raise fields.error(f"unsupported architecture {named}; supported: {', '.join(sorted(FAMILIES))}")


def _reject_unsupported(fields: Fields) -> None:
    """Raise ModelError for settings that change the computation and that the decoder does not support."""
    if fields.flag("use_sliding_window"):
        raise fields.error("use_sliding_window is true; only full attention is supported")
    if other := set(fields.texts("layer_types", [])) - {"full_attention"}:
        raise fields.error(f"layer_types names {shown(min(other))}; only full_attention is supported")
    activation = fields.value("hidden_act") if "hidden_act" in fields else "silu"
    if activation != "silu":
        raise fields.error(f"hidden_act is {shown(activation)}; only 'silu' is supported")


def _reject_quantised(fields: Fields, model_dir: Path) -> None:
    """Raise ModelError for quantised weights, by the files of the export; `Checkpoint.verify` finds the others."""
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
    """RoPE base and scaling: `rope_scaling`, or else `rope_parameters`, as transformers 5 reads them.

    `rope_scaling` replaces `rope_parameters`. Either may contain `rope_theta`; otherwise the top-level one is used.
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

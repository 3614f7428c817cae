"""Turn a GGUF file of a known model family into a Hugging Face checkpoint directory.

Torch-free: tensors are dequantised with the `gguf` package one at a time and streamed into one safetensors file, so
that only one tensor is in memory. The names (`models/`) and the permutation that is reversed here are those of
llama.cpp's `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from tfserve.errors import ModelError
from tfserve.model.gguf.file import GgufFile
from tfserve.model.gguf.tokenizer import write_tokenizer
from tfserve.model.loading.config import MAX_SIZES, ModelConfig, read_model_config
from tfserve.model.loading.fields import Fields, loading
from tfserve.model.models.base import FAMILIES, Family, StoredTensor, stored_tensors

DType = Literal["auto", "float32", "bfloat16", "float16"]

_SAFETENSORS_DTYPE = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_STORED_DTYPE = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ROPE_FACTORS = "rope_freqs.weight"


def import_gguf(file: Path, out_dir: Path, *, progress: bool = True, dtype: DType = "auto") -> Path:
    """Convert `file` into a Hugging Face checkpoint directory `out_dir` (made here; must not exist, or be empty).

    `dtype` is the type of the stored weights; "auto" keeps the file's own float type, and takes bfloat16 for quantised
    ones. The directory gets its name only when it is complete. Returns `out_dir`. Raises ModelError for an unknown
    architecture, tokenizer or tensor, for damaged files, and if the directory cannot be written.
    """
    with loading(file):
        return _import(file, out_dir, progress, dtype)


def _import(file: Path, out_dir: Path, progress: bool, dtype: DType) -> Path:
    source = GgufFile(file)
    family = _family(source)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ModelError(f"{out_dir} already exists; choose another directory, or delete it first")
    stored = _stored_dtype(source) if dtype == "auto" else dtype
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        fields = _model_config(source, family, stored)
        config = read_model_config(Fields(fields, file), Fields({}, file))
        tensors = _tensors(source, config)
        _write_json(staging / "config.json", fields)
        _write_json(staging / "generation_config.json", _token_ids(source))
        write_tokenizer(source, staging)
        paired = config.head_dim if family.gguf_pairs else None
        _write_weights(source, tensors, paired, staging / "model.safetensors", stored, progress=progress)
        staging.chmod(0o755)  # mkdtemp creates it readable for the user only
        staging.replace(out_dir)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return out_dir


def _family(source: GgufFile) -> Family:
    known = {family.gguf: family for family in FAMILIES.values() if family.gguf is not None}
    if source.architecture not in known:
        names = ", ".join(sorted(known))
        raise ModelError(f"{source.path} has architecture {source.architecture!r}; only {names} can be imported")
    return known[source.architecture]


def _model_config(source: GgufFile, family: Family, dtype: str) -> dict[str, Any]:
    """Hugging Face's config.json, with keys that every release of transformers reads."""
    fields, key = source.fields, source.key
    hidden = fields.integer(key("embedding_length"), most=MAX_SIZES["hidden_size"])
    heads = fields.integer(key("attention.head_count"), most=MAX_SIZES["num_attention_heads"])
    head_dim = fields.integer(key("attention.key_length"), hidden // heads, most=MAX_SIZES["head_dim"])
    rotary = fields.integer(key("rope.dimension_count"), head_dim)
    if rotary != head_dim:
        raise ModelError(
            f"{source.path} rotates {rotary} of {head_dim} dimensions per head; only full rotation is known"
        )
    config = {
        "architectures": [family.architecture],
        "model_type": source.architecture,
        "torch_dtype": dtype,
        "vocab_size": _vocab_size(source),
        "hidden_size": hidden,
        "intermediate_size": fields.integer(key("feed_forward_length"), most=MAX_SIZES["intermediate_size"]),
        "num_hidden_layers": _num_layers(source),
        "num_attention_heads": heads,
        "num_key_value_heads": _kv_heads(source),
        "head_dim": head_dim,
        "max_position_embeddings": fields.integer(key("context_length"), most=MAX_SIZES["max_position_embeddings"]),
        "rms_norm_eps": _shortest(fields.number(key("attention.layer_norm_rms_epsilon"))),
        "rope_theta": _shortest(fields.number(key("rope.freq_base"), 10000.0)),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in source.tensor_names,
        "attention_bias": "blk.0.attn_q.bias" in source.tensor_names,
        **_token_ids(source),
    }
    scaling = _rope_scaling(source, head_dim, config["rope_theta"])
    if scaling:
        config["rope_scaling"] = scaling
    return config


def _token_ids(source: GgufFile) -> dict[str, Any]:
    """Special token ids; several end tokens (Llama 3's end of text and end of turn) become a list."""
    ids: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("pad", "padding")):
        if found := _token_id(source, key):
            ids[f"{name}_token_id"] = found[0]
    unique = list(dict.fromkeys(token for key in ("eos", "eot", "eom") for token in _token_id(source, key)))
    if unique:
        ids["eos_token_id"] = unique if len(unique) > 1 else unique[0]
    return ids


def _token_id(source: GgufFile, key: str) -> list[int]:
    """A special token's id, if the file names one."""
    return source.fields.token_ids(f"tokenizer.ggml.{key}_token_id", _vocab_size(source))


def _vocab_size(source: GgufFile) -> int:
    return source.shape("token_embd.weight")[0]


def _num_layers(source: GgufFile) -> int:
    return source.fields.integer(source.key("block_count"), most=MAX_SIZES["num_hidden_layers"])


def _kv_heads(source: GgufFile) -> int:
    return source.fields.integer(
        source.key("attention.head_count_kv"), source.fields.integer(source.key("attention.head_count"))
    )


def _rope_scaling(source: GgufFile, head_dim: int, theta: float) -> dict[str, Any] | None:
    if _ROPE_FACTORS in source.tensor_names:
        return _llama3_scaling(source, head_dim, theta)
    kind = source.fields.text(source.key("rope.scaling.type"), "none")
    if kind != "none":
        raise ModelError(f"{source.path} scales rotary positions by {kind!r}; supported: none and llama3")
    return None


def _llama3_scaling(source: GgufFile, head_dim: int, theta: float) -> dict[str, Any] | None:
    """Find the llama3 rope_scaling from `rope_freqs.weight`, which holds the divisor of each inverse frequency.

    Llama 3.1 to 3.3 use the same thresholds and differ only in the factor, so each factor is tried and verified.
    """
    divisors = source.tensor(_ROPE_FACTORS)
    factor = round(float(divisors.max()), 4)
    if factor == 1.0:
        return None
    low, high, original = 1.0, 4.0, 8192
    inv_freq = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = original * inv_freq / (2 * math.pi)  # rotations within the original context
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise ModelError(
            f"{source.path}: {_ROPE_FACTORS} does not follow Llama 3.1's rope scaling; use the Hugging Face checkpoint"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _tensors(source: GgufFile, config: ModelConfig) -> dict[str, StoredTensor]:
    """The target of each tensor by GGUF name, in file order. Raises ModelError for an unknown or missing tensor."""
    expected = {tensor.gguf: tensor for tensor in stored_tensors(config)}
    found = [name for name in source.tensor_names if name != _ROPE_FACTORS]
    if unknown := [name for name in found if name not in expected]:
        raise ModelError(f"{source.path} holds tensor {unknown[0]!r}, which no {source.architecture} decoder here uses")
    if missing := expected.keys() - set(found):
        raise ModelError(f"{source.path} lacks {len(missing)} tensors, such as {min(missing)!r}; it is incomplete")
    for name in found:
        if source.shape(name) != expected[name].shape:
            raise ModelError(
                f"{source.path}: tensor {name} has shape {list(source.shape(name))}, but the metadata make it "
                f"{list(expected[name].shape)}; it is damaged: download it again"
            )
    return {name: expected[name] for name in found}


def _write_weights(
    source: GgufFile, tensors: dict[str, StoredTensor], paired: int | None, path: Path, dtype: str, *, progress: bool
) -> None:
    """Stream all tensors into one safetensors file: header length (8 bytes), JSON header, then the data.

    `paired` is the head size if the file stores rotated pairs as neighbours; None otherwise.
    """
    itemsize = 4 if dtype == "float32" else 2
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors.values():
        start, end = end, end + math.prod(tensor.shape) * itemsize
        header[tensor.name] = {"dtype": _SAFETENSORS_DTYPE[dtype], "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8, for readers that map the file
    bar = tqdm(total=end, unit="B", unit_scale=True, desc="converting weights", disable=not progress)
    with path.open("wb") as out, bar:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            values = source.tensor(name)
            if tensor.rotated and paired is not None:
                values = _parted(values, paired)
            bar.update(out.write(_encode(values, dtype).data))


def _parted(values: npt.NDArray[np.float32], head_dim: int) -> npt.NDArray[np.float32]:
    """Rows of q or k in Hugging Face's order, the halves of a head apart; llama.cpp stores rotated pairs together."""
    pairs = values.reshape(-1, head_dim // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _encode(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """Values in `dtype`; bfloat16, which numpy lacks, as uint16 rounded to nearest even."""
    if dtype == "float32":
        return np.ascontiguousarray(values, dtype="<f4")
    if dtype == "float16":
        return np.ascontiguousarray(values, dtype="<f2")
    bits = np.ascontiguousarray(values, dtype="<f4").view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")


def _stored_dtype(source: GgufFile) -> str:
    return _STORED_DTYPE.get(source.type_name("blk.0.attn_q.weight"), "bfloat16")


def _shortest(value: float) -> float:
    """A float32 from the file as its shortest decimal: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n")

"""Tiny random HF models and byte-level BPE tokenizers, written as GGUF files the way llama.cpp's converter does."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, models, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 300
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
CORPUS = [
    "the cat isn't on the mat, they've seen 123 or 4567 cats; we'll see\n\n  def cat(n):\n    return n + 1 # é ü"
] * 4

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**_BYTES, "use_regex": False}]}


PRE_TOKENIZERS = {
    "gpt-2": _BYTES,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTES]},
    "llama-bpe": _split(_SPLIT % "{1,3}"),
    "qwen2": _split(_SPLIT % ""),
    "tekken": _split(_TEKKEN),
}
"""As in the tokenizer.json that Hugging Face publishes for GPT-2, SmolLM2, Llama 3, Qwen2 and Mistral Nemo."""


def train_tokenizer(pre: str) -> Tokenizer:
    """A byte-level BPE of VOCAB tokens, the first three of them special and the last two user-defined."""
    tree = json.loads(Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "tekken"))).to_str())
    tree["pre_tokenizer"] = PRE_TOKENIZERS[pre]
    tree["decoder"] = _BYTES
    tree["normalizer"] = {"type": "NFC"} if pre == "qwen2" else None
    tokenizer = Tokenizer.from_str(json.dumps(tree))
    alphabet = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 2, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<tool_call>", "</tool_call>")])
    assert tokenizer.get_vocab_size() == VOCAB
    return tokenizer


def tiny_model(kind: str) -> PreTrainedModel:
    """A random fp32 model: "llama", "llama3" (rope scaling), "qwen2", "qwen2-tied" or "qwen3"."""
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": kind == "qwen2-tied",
        "initializer_range": 0.2,
    }
    if kind.startswith("qwen2"):
        model = Qwen2ForCausalLM(Qwen2Config(**common, rms_norm_eps=1e-6))
    elif kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**common, rms_norm_eps=1e-6, head_dim=32))
    else:
        rope = {"rope_type": "default", "rope_theta": 500000.0}
        if kind == "llama3":
            rope |= {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            rope["original_max_position_embeddings"] = 8192
        model = LlamaForCausalLM(LlamaConfig(**common, rms_norm_eps=1e-5, rope_parameters=rope))
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


@dataclass
class GgufRecipe:
    """What to write; most fields are ways in which a file can be wrong or special."""

    model: PreTrainedModel
    pre: str | None = "smollm"
    quantisation: str = "F32"
    architecture: str | None = None
    tokenizer_model: str = "gpt2"
    leave_out: tuple[str, ...] = ()
    extra_tensors: dict[str, np.ndarray] = field(default_factory=dict)
    extra_ints: dict[str, int] = field(default_factory=dict)
    replaced: dict[str, Any] = field(default_factory=dict)
    rope_factors: np.ndarray | None = None


def write_gguf(recipe: GgufRecipe, path: Path) -> Tokenizer:
    """Write the file; returns the tokenizer that it holds."""
    arch = recipe.architecture or recipe.model.config.model_type
    writer = gguf.GGUFWriter(path, arch)
    config = recipe.model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type == "qwen3":
        writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for key, value in recipe.extra_ints.items():
        writer.add_uint32(key, value)
    tokenizer = _add_tokenizer(writer, recipe)
    for key, value in recipe.replaced.items():
        for fields in writer.kv_data:
            fields.pop(key, None)
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, values in _tensors(recipe).items():
        if name not in recipe.leave_out:
            _add_tensor(writer, name, values, recipe.quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tokenizer


def _add_tokenizer(writer: gguf.GGUFWriter, recipe: GgufRecipe) -> Tokenizer:
    tokenizer = train_tokenizer(recipe.pre if recipe.pre in PRE_TOKENIZERS else "gpt-2")
    tokens = [tokenizer.id_to_token(i) for i in range(VOCAB)]
    types = [3 if t in SPECIAL else 4 if t.endswith("tool_call>") else 1 for t in tokens]
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model(recipe.tokenizer_model)
    if recipe.pre is not None:
        writer.add_tokenizer_pre(recipe.pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    return tokenizer


def _tensors(recipe: GgufRecipe) -> dict[str, np.ndarray]:
    model, config = recipe.model, recipe.model.config
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    tensors = {}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = parameter.numpy()
        if config.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        tensors[table.get_name(name, try_suffixes=(".weight", ".bias"))] = values
    if recipe.rope_factors is not None:
        tensors["rope_freqs.weight"] = recipe.rope_factors
    return tensors | recipe.extra_tensors


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, quantisation: str) -> None:
    if values.ndim == 1 or quantisation == "F32":
        writer.add_tensor(name, np.ascontiguousarray(values, dtype=np.float32))
        return
    kind = gguf.GGMLQuantizationType[quantisation]
    writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)

"""A GGUF file becomes a checkpoint directory that Hugging Face loads, with the original's logits and token ids."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.model.gguf.tiny_gguf import SPECIAL, VOCAB, GgufRecipe, tiny_model, write_gguf
from tfserve.errors import ModelError
from tfserve.model.gguf.conversion import import_gguf

IDS = torch.arange(3, 43).remainder(VOCAB).unsqueeze(0)
EVERYTHING = (
    *("token_embd.weight", "output_norm.weight", "output.weight"),
    *(
        f"blk.{layer}.{part}.weight"
        for layer in range(2)
        for part in (
            "attn_norm",
            "attn_q",
            "attn_k",
            "attn_v",
            "attn_output",
            "ffn_norm",
            "ffn_gate",
            "ffn_up",
            "ffn_down",
        )
    ),
)
TEXTS = [
    "the cat isn't on the mat, they've seen 123 or 4567 cats",
    "x = 1234567890 + 3.14159; y[10]",
    "  two  spaces\n\n\n\ttabs\r\n and an end   ",
    "naïve café e\u0301 — Ünïcode Привет 你好 🙂👩‍👩‍👧",
    "We'LL SHOUT, don'T we? ½ ² Ⅷ",
    "getHTTPResponse('/usr/lib') // 2024-01-31 ǅ",
    "<|im_start|>user\n<tool_call>{}</tool_call><|im_end|>",
    "",
]


def convert(recipe: GgufRecipe, folder: Path, **options: str) -> Path:
    write_gguf(recipe, folder / "tiny.gguf")
    return import_gguf(folder / "tiny.gguf", folder / "out", progress=False, **options)


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def rope_factors(model: torch.nn.Module) -> np.ndarray:
    """What llama.cpp's converter stores: how much slower each rotary frequency of a scaled model turns."""
    head_dim = model.config.head_dim
    plain = 500000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return (plain / model.model.rotary_emb.inv_freq.double()).float().numpy()


@pytest.mark.parametrize("kind", ["llama", "llama3", "qwen2", "qwen2-tied", "qwen3"])
def test_float_file_gives_the_original_logits(tmp_path, kind):
    original = tiny_model(kind)
    factors = rope_factors(original) if kind == "llama3" else None
    out = convert(GgufRecipe(original, rope_factors=factors), tmp_path)

    loaded, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)

    assert loaded.dtype == torch.float32
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(logits(loaded), logits(original))


def test_llama3_rope_scaling_is_recovered_from_its_factors(tmp_path):
    original = tiny_model("llama3")
    out = convert(GgufRecipe(original, rope_factors=rope_factors(original)), tmp_path)

    assert json.loads((out / "config.json").read_text())["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


@pytest.mark.parametrize(
    ("kind", "quantisation", "levels"), [("llama", "Q8_0", 254), ("qwen2", "Q4_1", 15), ("qwen3", "Q8_0", 254)]
)
def test_quantised_file_gives_the_logits_of_the_rounded_weights(tmp_path, kind, quantisation, levels):
    original = tiny_model(kind)
    out = convert(GgufRecipe(original, quantisation=quantisation), tmp_path, dtype="float32")
    loaded = AutoModelForCausalLM.from_pretrained(out)

    storage = gguf.GGMLQuantizationType[quantisation]
    for name, weight in original.state_dict().items():
        if weight.ndim == 2:
            rounded = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), storage), storage))
            assert 0 < (rounded - weight).abs().max() < 2 * weight.abs().max() / levels, name
            weight.copy_(rounded)
    assert torch.equal(logits(loaded), logits(original))


@pytest.mark.parametrize(("stored", "expected"), [("F32", "float32"), ("BF16", "bfloat16"), ("Q8_0", "bfloat16")])
def test_auto_keeps_float_types_and_stores_quantised_weights_as_bfloat16(tmp_path, stored, expected):
    original = tiny_model("qwen2")
    out = convert(GgufRecipe(original, quantisation=stored), tmp_path)

    loaded = AutoModelForCausalLM.from_pretrained(out)

    assert loaded.dtype == getattr(torch, expected)
    if stored == "BF16":
        for name, weight in original.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weight.to(torch.bfloat16)), name


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_token_ids_and_text_equal_the_original_tokenizer(tmp_path, pre):
    original = write_gguf(GgufRecipe(tiny_model("llama"), pre=pre), tmp_path / "tiny.gguf")
    out = import_gguf(tmp_path / "tiny.gguf", tmp_path / "out", progress=False)

    for rebuilt in (Tokenizer.from_file(str(out / "tokenizer.json")), AutoTokenizer.from_pretrained(out)):
        for text in TEXTS:
            ids = rebuilt.encode(text, add_special_tokens=False)
            ids = getattr(ids, "ids", ids)
            assert ids == original.encode(text, add_special_tokens=False).ids, text
            assert rebuilt.decode(ids, skip_special_tokens=False) == original.decode(ids, skip_special_tokens=False)


def test_special_tokens_and_chat_template_reach_transformers(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(convert(GgufRecipe(tiny_model("llama")), tmp_path))

    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.decode(tokenizer.encode("".join(SPECIAL) + "cat"), skip_special_tokens=True) == "cat"
    text = tokenizer.apply_chat_template([{"role": "user", "content": "cat"}], tokenize=False)
    assert text == "<|im_start|>cat<|im_end|>"


def test_every_way_to_end_is_an_eos_id(tmp_path):
    out = convert(GgufRecipe(tiny_model("llama")), tmp_path)

    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def test_llama3_tokenizer_puts_bos_in_front_unless_the_file_says_no(tmp_path):
    recipe = GgufRecipe(tiny_model("llama"), pre="llama-bpe")
    tokenizer = AutoTokenizer.from_pretrained(convert(recipe, tmp_path))

    assert tokenizer.encode("cat")[0] == 1
    assert tokenizer.encode("cat")[1:] == tokenizer.encode("cat", add_special_tokens=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "gemma2"}, "architecture 'gemma2'; only llama, qwen2, qwen3"),
        ({"pre": "viking"}, "tokenizer.ggml.pre is 'viking'; known are .*smollm"),
        ({"pre": None}, "tokenizer.ggml.pre is 'default'"),
        ({"tokenizer_model": "llama"}, "tokenizer of kind 'llama' .SentencePiece"),
        ({"extra_tensors": {"blk.0.ffn_gate_exps.weight": np.ones((2, 32))}}, "'blk.0.ffn_gate_exps.weight'"),
        ({"leave_out": ("blk.1.ffn_up.weight",)}, "lacks 1 tensors, such as 'blk.1.ffn_up.weight'"),
        ({"replaced": {"llama.feed_forward_length": 130}}, r"ffn_gate.weight has shape \[128, 64\].* \[130, 64\]"),
        ({"rope_factors": np.linspace(1, 9, 8)}, "does not follow Llama 3.1's rope scaling"),
        ({"extra_ints": {"split.count": 3}}, "one part of several"),
        ({"leave_out": EVERYTHING}, "tiny.gguf holds no tensor '.*'; it is incomplete"),
        ({"leave_out": ("token_embd.weight",)}, "tiny.gguf holds no tensor 'token_embd.weight'"),
        ({"extra_ints": {"tokenizer.ggml.eom_token_id": 300}}, r"ggml.eom_token_id must be ids .* \[0, 300\), got 300"),
        (
            {"extra_ints": {"tokenizer.ggml.unknown_token_id": 2**32 - 1}},
            "unknown_token_id must be ids .* got 4294967295",
        ),
        ({"extra_ints": {"llama.attention.key_length": 0}}, "attention.key_length must be a positive integer, got 0"),
        (
            {"replaced": {"llama.rope.scaling.type": "yarn"}},
            "scales rotary positions by 'yarn'; supported: none and",
        ),
        ({"replaced": {"llama.rope.dimension_count": "16"}}, "dimension_count must be a positive integer, got '16'"),
        ({"replaced": {"tokenizer.ggml.add_bos_token": "no"}}, "add_bos_token must be true or false, got 'no'"),
        ({"extra_ints": {"llama.rope.dimension_count": 8}}, "rotates 8 of 16 dimensions"),
    ],
)
def test_file_that_cannot_be_honoured_is_refused_and_nothing_is_left(tmp_path, change, message):
    with pytest.raises(ModelError, match=message):
        convert(GgufRecipe(tiny_model("llama"), **change), tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


WRONG = (-1, 0, 7.5, float("nan"), True, "", "text", [1], ["a"])


@pytest.mark.parametrize(
    "key",
    [
        "general.architecture",
        *(
            f"llama.{name}"
            for name in (
                *("context_length", "embedding_length", "block_count", "feed_forward_length", "rope.freq_base"),
                *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
                *("attention.key_length", "rope.dimension_count", "rope.scaling.type"),
            )
        ),
        *(
            f"tokenizer.{name}"
            for name in (
                *("ggml.model", "ggml.pre", "ggml.tokens", "ggml.token_type", "ggml.merges", "ggml.bos_token_id"),
                *("ggml.eos_token_id", "ggml.eot_token_id", "ggml.padding_token_id", "ggml.add_bos_token"),
                "chat_template",
            )
        ),
        "split.count",
    ],
)
def test_metadata_of_a_wrong_type_is_imported_or_named_by_file(tmp_path, key, llama):
    refused = 0
    for number, value in enumerate(WRONG):
        file, out = tmp_path / f"{number}.gguf", tmp_path / f"out{number}"
        write_gguf(GgufRecipe(llama, replaced={key: value}), file)
        try:
            import_gguf(file, out, progress=False)
        except ModelError as error:
            text = str(error)
            assert str(file) in text
            assert "\n" not in text
            assert not out.exists()
            refused += 1
    assert refused > 0


def test_truncated_missing_and_foreign_files_are_named(tmp_path):
    whole = tmp_path / "whole.gguf"
    write_gguf(GgufRecipe(tiny_model("llama")), whole)
    data = whole.read_bytes()
    for name, content in {
        "data": data[: len(data) - 5000],
        "header": data[:3000],
        "foreign": b"PK\x03\x04" * 99,
    }.items():
        damaged = tmp_path / f"{name}.gguf"
        damaged.write_bytes(content)
        with pytest.raises(ModelError, match=rf"{name}.gguf is not a whole GGUF file"):
            import_gguf(damaged, tmp_path / "out", progress=False)
    with pytest.raises(ModelError, match=r"absent\.gguf is not a file"):
        import_gguf(tmp_path / "absent.gguf", tmp_path / "out", progress=False)


def test_existing_directory_is_never_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")

    with pytest.raises(ModelError, match="out already exists"):
        convert(GgufRecipe(tiny_model("llama")), tmp_path)

    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"

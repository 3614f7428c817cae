from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tfserve.errors import ModelError
from tfserve.model.config import Llama3RopeScaling, ModelConfig, load_model_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def load(fields: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
        (tmp_path / "config.json").write_text(json.dumps(fields))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return load_model_config(tmp_path)

    return load


@pytest.mark.parametrize("name", ["tiny_llama3", "tiny_qwen25", "tiny_qwen25_untied"])
def test_both_spellings_of_config_json_mean_the_same(name: str, load: Any, request: pytest.FixtureRequest) -> None:
    new = json.loads((request.getfixturevalue(name) / "config.json").read_text())
    assert {"rope_parameters", "dtype"} <= new.keys()
    old = dict(new)
    rope = old.pop("rope_parameters")
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    old["torch_dtype"] = old.pop("dtype")
    assert load(old) == load(new)


def test_llama3_rope_scaling_is_read_with_its_older_type_key_too(load: Any) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    expected = Llama3RopeScaling(8.0, 1.0, 4.0, 64)
    for key in ("rope_type", "type"):
        config = load(LLAMA | {"rope_scaling": {key: "llama3", **scaling}})
        assert (config.rope_theta, config.rope_scaling) == (500000.0, expected)


def test_shapes_left_out_are_derived(load: Any) -> None:
    fields = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    config = load(fields)
    assert (config.head_dim, config.num_key_value_heads, config.q_size, config.kv_size) == (8, 8, 64, 64)
    assert load(LLAMA | {"head_dim": 16}).q_size == 128


def test_biases_follow_the_architecture(load: Any) -> None:
    def biases(fields: dict[str, Any]) -> tuple[bool, bool, bool]:
        config = load(fields)
        return config.qkv_bias, config.o_bias, config.mlp_bias

    assert biases(LLAMA) == (False, False, False)
    assert biases(LLAMA | {"attention_bias": True}) == (True, True, False)
    assert biases(LLAMA | {"mlp_bias": True}) == (False, False, True)
    assert biases(QWEN2) == (True, False, False)


@pytest.mark.parametrize(
    ("eos", "generation", "expected"),
    [
        (2, None, (2,)),
        ([2, 7], None, (2, 7)),
        (2, {"eos_token_id": [7, 2]}, (2, 7)),
        (None, {"eos_token_id": 9}, (9,)),
        (None, {}, ()),
    ],
)
def test_eos_ids_of_both_files_are_merged(eos: Any, generation: Any, expected: tuple[int, ...], load: Any) -> None:
    assert load(LLAMA | {"eos_token_id": eos}, generation).eos_token_ids == expected


def test_num_parameters_counts_what_the_checkpoint_holds(tiny_llama3: Path, tiny_qwen25: Path) -> None:
    from transformers import AutoModelForCausalLM

    for path in (tiny_llama3, tiny_qwen25):
        held = AutoModelForCausalLM.from_pretrained(path).num_parameters()
        assert load_model_config(path).num_parameters == held


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM; supported: LlamaForCausalLM, Qwen2ForCausalLM"),
        ({"architectures": None, "model_type": "mamba"}, r"none \(model_type 'mamba'\)"),
        ({"use_sliding_window": True}, "only full attention is supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope type 'yarn' is not supported; supported: default, llama3",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantised \(awq\)"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": "many"}, "vocab_size must be a positive integer, got 'many'"),
        ({"num_key_value_heads": 3}, "8 is not a multiple of num_key_value_heads 3"),
        ({"torch_dtype": "int8"}, "dtype 'int8' is not supported"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(change: dict[str, Any], message: str, load: Any) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load(LLAMA | change)
    assert "config.json" in str(caught.value)


def test_a_directory_without_config_or_with_a_broken_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json in .*: give a checkpoint directory"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": [')
    with pytest.raises(ModelError, match="is not valid JSON"):
        load_model_config(tmp_path)

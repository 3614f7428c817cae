from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import transformers
from transformers import MistralConfig

from tests.model.test_parity import TINY
from tfserve.errors import ModelError
from tfserve.model.loading.config import Llama3RopeScaling, ModelConfig, load_model_config
from tfserve.model.models.base import FAMILIES, register

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
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"]}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", **SCALING}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def load(fields: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
        (tmp_path / "config.json").write_text(json.dumps(fields))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return load_model_config(tmp_path)

    return load


@pytest.mark.parametrize("name", TINY)
def test_both_spellings_of_config_json_mean_the_same(name: str, load: Any, request: pytest.FixtureRequest) -> None:
    new = json.loads((request.getfixturevalue(name) / "config.json").read_text())
    assert {"rope_parameters", "dtype"} <= new.keys()
    old = dict(new)
    rope = old.pop("rope_parameters")
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    old["torch_dtype"] = old.pop("dtype")
    assert load(old) == load(new)


def test_the_readme_names_every_family() -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    assert set(re.findall(r"\| `(\w+)` \| (?:`\w+`)? ?\|$", readme, re.MULTILINE)) == set(FAMILIES)


def test_two_families_with_the_same_name_are_refused() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        register(FAMILIES["LlamaForCausalLM"])
    with pytest.raises(ValueError, match="qwen3"):
        register(msgspec.structs.replace(FAMILIES["Qwen3ForCausalLM"], architecture="OtherForCausalLM"))


def test_llama3_rope_scaling_is_read_with_its_older_type_key_too(load: Any) -> None:
    expected = Llama3RopeScaling(8.0, 1.0, 4.0, 64)
    for key in ("rope_type", "type"):
        config = load(LLAMA | {"rope_scaling": {key: "llama3", **SCALING}})
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
    assert biases(QWEN3) == (False, False, False)
    assert biases(QWEN3 | {"attention_bias": True}) == (True, True, False)
    assert biases(MISTRAL | {"attention_bias": True, "mlp_bias": True}) == (False, False, False)  # as transformers


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_missing_head_dim_means_what_transformers_takes_for_it(architecture: str, load: Any) -> None:
    fields: dict[str, Any] = LLAMA | {"architectures": [architecture]}
    theirs = getattr(transformers, architecture).config_class.from_dict(fields)
    head_dim = getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)  # Qwen2 has no such key
    assert load(fields).head_dim == head_dim


@pytest.mark.parametrize(
    ("window", "max_tokens"), [({}, 4096), ({"sliding_window": None}, 32768), ({"sliding_window": 8192}, 8192)]
)
def test_a_sliding_window_caps_the_context(window: dict[str, Any], max_tokens: int, load: Any) -> None:
    fields = MISTRAL | {"max_position_embeddings": 32768} | window
    assert load(fields).max_position_embeddings == max_tokens
    assert load(fields | {"max_position_embeddings": 64}).max_position_embeddings == 64
    theirs = MistralConfig.from_dict(fields).sliding_window
    assert load(fields).sliding_window == theirs


@pytest.mark.parametrize("fields", [QWEN2, QWEN3])
def test_a_sliding_window_that_is_not_used_caps_nothing(fields: dict[str, Any], load: Any) -> None:
    config = load(fields | {"sliding_window": 64, "use_sliding_window": False})
    assert (config.max_position_embeddings, config.sliding_window) == (1024, None)


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


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("eos", [-1, 512, 99999, "2", 2.0, True, {"id": 2}, [2, 512], [2, None], [[2]], ["2"], [2.0]])
def test_an_eos_id_that_is_no_token_is_refused_by_file_and_key(file: str, eos: Any, load: Any) -> None:
    given = {"eos_token_id": eos}
    with pytest.raises(ModelError, match=rf"/{file}: eos_token_id must be ids of the vocabulary, .* \[0, 512\), got"):
        load(LLAMA | given) if file == "config.json" else load(LLAMA, given)


@pytest.mark.parametrize("name", TINY)
def test_num_parameters_counts_what_the_checkpoint_holds(name: str, request: pytest.FixtureRequest) -> None:
    from transformers import AutoModelForCausalLM

    path = request.getfixturevalue(name)
    held = AutoModelForCausalLM.from_pretrained(path).num_parameters()
    assert load_model_config(path).num_parameters == held


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM; supported: LlamaForCausalLM, MistralForCausalLM"),
        ({"architectures": None, "model_type": "mamba"}, r"none \(model_type 'mamba'\)"),
        ({"use_sliding_window": True}, "only full attention is supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope type 'yarn' is not supported; supported: default, llama3",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        (
            {"rope_scaling": {"rope_type": "llama3", **SCALING, "high_freq_factor": 1.0}},
            "high_freq_factor must be above",
        ),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object, got 'yarn'"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling.factor needs a rope_type"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.full_attention: rotary"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantised \(awq\)"),
        ({"quantization_config": {"load_in_4bit": True}}, r"quantised"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, r"quantised \(compressed-tensors\)"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, got 'false'"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of texts"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types names 'sliding_attention'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number, got nan"),
        ({"head_dim": 8.0}, "head_dim must be a positive integer, got 8.0"),
        ({"num_attention_heads": 128, "num_key_value_heads": 1}, "head_dim must be a positive integer, got 0"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": "many"}, "vocab_size must be a positive integer, got 'many'"),
        ({"num_key_value_heads": 3}, "8 is not a multiple of num_key_value_heads 3"),
        ({"torch_dtype": "int8"}, "dtype 'int8' is not supported"),
    ],
)
@pytest.mark.parametrize("family", [LLAMA, QWEN3, MISTRAL], ids=["llama", "qwen3", "mistral"])
def test_what_would_be_computed_wrongly_is_refused(
    family: dict[str, Any], change: dict[str, Any], message: str, load: Any
) -> None:
    if message.startswith("head_dim must be a positive integer, got 0"):
        family = {key: value for key, value in LLAMA.items() if key != "head_dim"}
    with pytest.raises(ModelError, match=message) as caught:
        load(family | change)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "4096", [4096], 2**31])
def test_a_sliding_window_that_is_no_size_is_refused(value: Any, load: Any) -> None:
    with pytest.raises(ModelError, match=r"config\.json: sliding_window must be "):
        load(MISTRAL | {"sliding_window": value})


def test_a_directory_without_config_or_with_a_broken_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json in .*: give a checkpoint directory"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": [')
    with pytest.raises(ModelError, match="is not valid JSON"):
        load_model_config(tmp_path)


NEW = {"rope_type": "default", "rope_theta": 1e6}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": NEW, "rope_scaling": LLAMA3, "rope_theta": 5e5},
        {"rope_parameters": NEW, "rope_scaling": LLAMA3 | {"rope_theta": 3e5}, "rope_theta": 5e5},
        {"rope_parameters": NEW, "rope_scaling": LLAMA3 | {"rope_theta": 3e5}},
        {"rope_parameters": NEW, "rope_scaling": None},
        {"rope_parameters": NEW, "rope_scaling": {}, "rope_theta": 5e5},
        {"rope_parameters": LLAMA3, "rope_scaling": {"type": "default"}, "rope_theta": 5e5},
        {"rope_parameters": LLAMA3 | {"rope_theta": 1e6}},
        {"rope_parameters": LLAMA3, "rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default"}},
        {"rope_parameters": None, "rope_theta": 5e5},
        {"rope_scaling": LLAMA3 | {"type": "linear"}, "rope_theta": 5e5},
        {"rope_scaling": {key: value for key, value in LLAMA3.items() if not key.startswith("orig")}},
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 77},
        {},
    ],
)
def test_rope_settings_in_two_places_are_read_as_transformers_reads_them(rope: dict[str, Any], load: Any) -> None:
    from transformers import Qwen2Config

    fields = {key: value for key, value in QWEN2.items() if not key.startswith("rope")} | rope
    theirs = dict(Qwen2Config.from_dict(json.loads(json.dumps(fields))).rope_parameters)
    config = load(fields)
    assert config.rope_theta == theirs["rope_theta"]
    if theirs["rope_type"] == "default":
        assert config.rope_scaling is None
    else:
        assert config.rope_scaling == Llama3RopeScaling(**{key: theirs[key] for key in SCALING})


def test_scaling_beside_new_parameters_is_refused_where_it_is_not_known(load: Any) -> None:
    for theta in ({}, {"rope_theta": 5e5}):
        fields = {key: value for key, value in QWEN2.items() if not key.startswith("rope")} | theta
        with pytest.raises(
            ModelError, match="rope_scaling: rope type 'yarn' is not supported; supported: default, llama3"
        ):
            load(fields | {"rope_parameters": NEW, "rope_scaling": YARN})


def test_scaling_that_would_hide_the_rotary_base_is_refused(load: Any) -> None:
    fields = {key: value for key, value in QWEN2.items() if not key.startswith("rope")}
    with pytest.raises(ModelError, match="rope_scaling replaces rope_parameters, whose rope_theta would be lost"):
        load(fields | {"rope_parameters": NEW, "rope_scaling": LLAMA3})


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_an_export_that_says_so_in_a_file_of_its_own_is_quantised(name: str, load: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"bits": 4}')
    with pytest.raises(ModelError, match=rf"{name}: the weights are quantised; give the unquantised checkpoint"):
        load(LLAMA)

"""Settings: defaults, files, overrides, and what each mistake is told."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tfserve.config import EngineConfig, config_from, load_config
from tfserve.config_words import config_from_args, parse_settings
from tfserve.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"


def test_command_line_beats_file_beats_default(tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text("model: demo\nmax_num_seqs: 8\nscheduler:\n  policy: fcfs\n")
    config = load_config(path, {"max_num_seqs": "4", "server.port": "9000"})
    assert (config.max_num_seqs, config.scheduler.policy, config.server.port) == (4, "fcfs", 9000)
    assert config.max_num_batched_tokens == 512


def test_a_list_is_given_with_commas_on_the_command_line():
    config = config_from_args("demo", ["--server.api_keys", "first,second", "--server.cors-origins=*"])
    assert config.server.api_keys == ("first", "second")
    assert config.server.cors_origins == ("*",)
    with pytest.raises(ConfigError, match="api_keys: a key is empty"):
        config_from_args("demo", ["--server.api_keys="])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "model: is required"),
        ({"model": ""}, "model: must name"),
        ({"model": "m", "max_num_seq": 3}, "max_num_seq: is not a setting; did you mean max_num_seqs?"),
        ({"model": "m", "scheduler": {"polcy": 1}}, "scheduler.polcy: is not a setting; did you mean scheduler.pol"),
        ({"model": "m", "max_num_seqs": "many"}, "max_num_seqs: must be an integer, got 'many'"),
        ({"model": "m", "max_num_seqs": 0}, "max_num_seqs: must be at least 1, got 0"),
        (
            {"model": "m", "scheduler": {"policy": "fcfs", "overload": "shed"}},
            "scheduler.overload: only policy tokenflow can 'shed'",
        ),
        (
            {"model": "m", "scheduler": {"policy": "round-robin", "overload": "share"}},
            "scheduler.overload: only policy tokenflow can 'share'",
        ),
        ({"model": "m", "scheduler": {"policy": "lifo"}}, "scheduler.policy: must be 'fcfs', 'fcfs-chunked', "),
        (
            {"model": "m", "scheduler": {"default_rate": 0.005}},
            "scheduler.default_rate: must be 0.01 to 1000000 tokens/s",
        ),
        (
            {"model": "m", "scheduler": {"default_rate": 1e7}},
            "scheduler.default_rate: must be 0.01 to 1000000 tokens/s",
        ),
        (
            {"model": "m", "scheduler": {"swap_gap_s": -1}},
            "scheduler.swap_gap_s: must not be negative, and",
        ),
        (
            {"model": "m", "scheduler": {"relief_s": float("inf")}},
            "scheduler.relief_s: must not be negative, and",
        ),
        (
            {"model": "m", "scheduler": {"buffer_scale_s": float("inf")}},
            "scheduler.buffer_scale_s: must be above 0",
        ),
        ({"model": "m\udcff"}, "model: must be valid UTF-8"),
        ({"model": "m", "served_model_name": "\udcff"}, "served_model_name: must be valid UTF-8"),
        ({"model": "m", "step_trace": "\udcff"}, "step_trace: must be valid UTF-8"),
        ({"model": "m", "pipeline_depth": 3}, "pipeline_depth: must be 1 or 2, got 3"),
        ({"model": "m", "tensor_parallel_size": 2}, "tensor_parallel_size: only 1"),
        ({"model": "m", "gpu_memory_utilization": 1.5}, "gpu_memory_utilization: must be"),
        ({"model": "m", "server": {"port": 70000}}, "server.port: must be"),
        ({"model": "m", "server": 3}, "server: must be an object, got 3"),
        ({"model": "m", "server": {"api_keys": ["good", ""]}}, "server.api_keys: a key is empty or has"),
        ({"model": "m", "server": {"api_keys": ["two words"]}}, "server.api_keys: a key is empty or has"),
        ({"model": "m", "server": {"max_body_bytes": 0}}, "server.max_body_bytes: must be at least 1, got 0"),
        ({"model": "m", "server": {"max_queued_requests": -1}}, "server.max_queued_requests: must not be negative"),
        ({"model": "m", "server": {"drain_timeout": float("nan")}}, "server.drain_timeout: must not be negative, and"),
        ({"model": "m", "host_kv_gib": -1}, "host_kv_gib: must not be negative, and a size in GiB, got -1"),
        ({"model": "m", "host_kv_gib": float("inf")}, "host_kv_gib: must not be negative, and a size in GiB, got inf"),
        ({"model": "m", "host_kv_gib": float("nan")}, "host_kv_gib: must not be negative, and a size in GiB, got nan"),
        ({"model": "m", "host_kv_gib": "much"}, "host_kv_gib: must be a number, got 'much'"),
        ({"model": "m", "emulated_bandwidth": 0}, "emulated_bandwidth: must be above 0 and in GiB/s, got 0"),
        ({"model": "m", "emulated_bandwidth": -2.5}, "emulated_bandwidth: must be above 0 and in GiB/s, got -2.5"),
        ({"model": "m", "emulated_bandwidth": float("inf")}, "emulated_bandwidth: must be above 0 and in GiB/s, got"),
        ({"model": "m", "emulated_bandwidth": float("nan")}, "emulated_bandwidth: must be above 0 and in GiB/s, got"),
    ],
)
def test_mistakes_are_named_with_their_key(tree, message):
    with pytest.raises(ConfigError) as caught:
        config_from(tree)
    assert str(caught.value).startswith(message)


def settings_of(struct, prefix=""):
    for field in msgspec.structs.fields(struct):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from settings_of(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


@pytest.mark.parametrize("key", list(settings_of(EngineConfig)))
def test_a_value_of_the_wrong_kind_is_named_with_its_key_and_its_file(key):
    *section, name = key.split(".")
    wrong = {name: [["secret"]]}
    tree = {"model": "m"} | ({section[0]: wrong} if section else wrong)
    with pytest.raises(ConfigError, match=r"must be .*\(in serve\.yaml\)") as caught:
        config_from(tree, source="serve.yaml")
    assert caught.value.key.startswith(key)
    assert ("secret" in str(caught.value)) is (key != "server.api_keys")


def test_file_mistakes_name_the_file(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: [unclosed")
    with pytest.raises(ConfigError, match=r"broken\.yaml is not valid YAML"):
        load_config(broken, {})
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "absent.yaml", {})
    broken.write_text("just a sentence")
    with pytest.raises(ConfigError, match="must hold"):
        load_config(broken, {})


def test_settings_words_become_a_config():
    assert parse_settings(["--max-num-seqs", "4", "--server.port=1"]) == {"max_num_seqs": "4", "server.port": "1"}
    config = config_from_args("some/dir", ["--scheduler.policy", "fcfs", "--debug-checks", "true"])
    assert (config.model, config.scheduler.policy, config.debug_checks) == ("some/dir", "fcfs", True)


@pytest.mark.parametrize("words", [["stray"], ["--key"], ["--a", "--b", "1"]])
def test_words_that_are_no_settings_are_refused(words):
    with pytest.raises(ConfigError):
        parse_settings(words)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_ready_made_configs_load(path):
    config = load_config(path, {})
    assert config.model
    assert config.scheduler.policy == "tokenflow"


def test_tokenflow_and_a_person_who_reads_are_the_default():
    scheduler = EngineConfig(model="m").scheduler
    assert (scheduler.policy, scheduler.default_rate) == ("tokenflow", 6.0)

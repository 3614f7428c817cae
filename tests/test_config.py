"""Settings: defaults, files, overrides, and the error for each mistake."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from tfserve.cli_config import OTHER_VARIABLES, config_from_args, environment_settings, parse_settings
from tfserve.config import SETTINGS, EngineConfig, SchedulerConfig, config_from, load_config, nested, variable_of
from tfserve.errors import ConfigError

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
STRUCTS = {
    "EngineConfig": "",
    "SchedulerConfig": "scheduler.",
    "TokenFlowConfig": "scheduler.tokenflow.",
    "FcfsConfig": "scheduler.fcfs.",
    "AblationConfig": "scheduler.ablation.",
    "ServerConfig": "server.",
}
"""Every struct of settings, and the prefix of their names."""


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
        (
            {"model": "m", "scheduler": {"tokenflow": {"low_bufer_s": 1}}},
            "scheduler.tokenflow.low_bufer_s: is not a setting; did you mean scheduler.tokenflow.low_buffer_s?",
        ),
        (
            {"model": "m", "scheduler": {"fcfs": {"q" * 30: 1}}},
            f"scheduler.fcfs.{'q' * 30}: is not a setting; known keys: scheduler.fcfs.reserve_clip_tokens, ",
        ),
        ({"model": "m", "scheduler": {"fcfs": 3}}, "scheduler.fcfs: must be an object, got 3"),
        ({"model": "m", "max_num_seqs": "many"}, "max_num_seqs: must be an integer, got 'many'"),
        ({"model": "m", "max_num_seqs": 0}, "max_num_seqs: must be an integer >= 1, got 0"),
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
            "scheduler.default_rate: must be a number >= 0.01 and <= 1000000.0, got ",
        ),
        (
            {"model": "m", "scheduler": {"default_rate": 1e7}},
            "scheduler.default_rate: must be a number >= 0.01 and <= 1000000.0, got ",
        ),
        (
            {"model": "m", "scheduler": {"tokenflow": {"min_swap_gain_s": -1}}},
            "scheduler.tokenflow.min_swap_gain_s: must be a number >= 0 and <= 1000000000, got -1",
        ),
        (
            {"model": "m", "scheduler": {"tokenflow": {"starvation_gap_s": float("inf")}}},
            "scheduler.tokenflow.starvation_gap_s: must be a number >= 0 and <= 1000000000, got inf",
        ),
        (
            {"model": "m", "scheduler": {"tokenflow": {"buffer_scale_s": float("inf")}}},
            "scheduler.tokenflow.buffer_scale_s: must be a number > 0 and <= ",
        ),
        ({"model": "m\udcff"}, "model: must be valid UTF-8"),
        ({"model": "m", "served_model_name": "\udcff"}, "served_model_name: must be valid UTF-8"),
        ({"model": "m", "step_trace": "\udcff"}, "step_trace: must be valid UTF-8"),
        ({"model": "m", "pipeline_depth": 3}, "pipeline_depth: must be 1 or 2, got 3"),
        ({"model": "m", "tensor_parallel_size": 2}, "tensor_parallel_size: must be 1, got 2"),
        ({"model": "m", "gpu_memory_utilization": 1.5}, "gpu_memory_utilization: must be"),
        ({"model": "m", "server": {"port": 70000}}, "server.port: must be"),
        ({"model": "m", "server": 3}, "server: must be an object, got 3"),
        ({"model": "m", "server": {"api_keys": ["good", ""]}}, "server.api_keys: a key is empty or has"),
        ({"model": "m", "server": {"api_keys": ["two words"]}}, "server.api_keys: a key is empty or has"),
        ({"model": "m", "server": {"max_body_bytes": 0}}, "server.max_body_bytes: must be an integer >= 1, got 0"),
        (
            {"model": "m", "server": {"max_queued_requests": -1}},
            "server.max_queued_requests: must be an integer >= 0, got -1",
        ),
        ({"model": "m", "server": {"drain_timeout": float("nan")}}, "server.drain_timeout: must be a number >= 0 and "),
        ({"model": "m", "host_kv_gib": -1}, "host_kv_gib: must be a number >= 0 and < 1048576, got -1"),
        ({"model": "m", "host_kv_gib": float("inf")}, "host_kv_gib: must be a number >= 0 and < 1048576, got inf"),
        ({"model": "m", "host_kv_gib": float("nan")}, "host_kv_gib: must be a number >= 0 and < 1048576, got nan"),
        ({"model": "m", "host_kv_gib": "much"}, "host_kv_gib: must be a number, got 'much'"),
        ({"model": "m", "emulated_bandwidth": 0}, "emulated_bandwidth: must be a number > 0 and < 1048576, got 0"),
        (
            {"model": "m", "emulated_bandwidth": -2.5},
            "emulated_bandwidth: must be a number > 0 and < 1048576, got -2.5",
        ),
        (
            {"model": "m", "emulated_bandwidth": float("inf")},
            "emulated_bandwidth: must be a number > 0 and < 1048576, got",
        ),
        (
            {"model": "m", "emulated_bandwidth": float("nan")},
            "emulated_bandwidth: must be a number > 0 and < 1048576, got",
        ),
    ],
)
def test_mistakes_are_named_with_their_key(tree, message):
    with pytest.raises(ConfigError) as caught:
        config_from(tree)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("key", list(SETTINGS))
def test_a_value_of_the_wrong_kind_is_named_with_its_key_and_its_file(key):
    tree = {"model": "m"} | nested({key: [["secret"]]})
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


def test_tokenflow_and_a_human_reader_are_the_default():
    scheduler = EngineConfig(model="m").scheduler
    assert (scheduler.policy, scheduler.default_rate) == ("tokenflow", 6.0)


def test_the_schema_for_editors_has_every_setting_with_its_help_and_its_bounds():
    schema = msgspec.json.schema(EngineConfig)["$defs"]
    told = {
        prefix + name: field["description"]
        for struct, prefix in STRUCTS.items()
        for name, field in schema[struct]["properties"].items()
        if prefix + name in SETTINGS
    }
    assert told == {setting.name: setting.help for setting in SETTINGS.values()}
    port = schema["ServerConfig"]["properties"]["port"]
    assert (port["minimum"], port["maximum"], port["default"]) == (0, 65535, 8000)


def test_every_setting_of_every_section_has_help():
    schema = msgspec.json.schema(EngineConfig)["$defs"]
    declared = {prefix + name for struct, prefix in STRUCTS.items() for name in schema[struct]["properties"]}
    assert declared - {prefix.rstrip(".") for prefix in STRUCTS.values()} == set(SETTINGS)


@pytest.mark.parametrize("given", ["on", "yes", "On", "true", True])
def test_an_enumeration_with_on_and_off_takes_what_yaml_has_for_them(given):
    config = config_from({"model": "m", "engine_process": given, "debug_checks": given})
    assert (config.engine_process, config.debug_checks) == ("on", True)


@pytest.mark.parametrize("given", ["off", "no", "OFF", "false", False])
def test_off_is_off_wherever_it_is_one_of_the_values(given):
    config = config_from({"model": "m", "engine_process": given, "server": {"pacing": given}})
    assert (config.engine_process, config.server.pacing) == ("off", "off")


def test_off_is_text_where_a_setting_is_text(tmp_path):
    (tmp_path / "serve.yaml").write_text("model: off\nserved_model_name: no\nstep_trace: on\n")
    config = load_config(tmp_path / "serve.yaml", {})
    assert (config.model, config.served_model_name, config.step_trace) == ("off", "no", "on")


def test_a_value_that_is_none_of_those_listed_is_told_all_of_them_and_the_nearest():
    makers = (
        lambda: config_from({"model": "m", "scheduler": {"overload": "shde"}}),
        lambda: config_from_args("m", ["--scheduler.overload", "shde"], {}),
        lambda: SchedulerConfig(overload="shde"),
    )
    for make in makers:
        with pytest.raises(ConfigError) as caught:
            make()
        assert caught.value.key == "scheduler.overload"
        for word in ("'queue'", "'share'", "'shed'", "got 'shde'; did you mean 'shed'?"):
            assert word in str(caught.value)
    with pytest.raises(ConfigError, match=r"'queue', 'share' or 'shed', got 'off'$"):
        config_from({"model": "m", "scheduler": {"overload": "off"}})


def test_command_line_beats_environment_beats_file(tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text("model: demo\nmax_num_seqs: 8\nseed: 8\nthreads: 8\n")
    environ = {"TFSERVE_MAX_NUM_SEQS": "4", "TFSERVE_SEED": "4", "TFSERVE_SERVER__API_KEYS": "one,two", "HOME": "/"}
    config = config_from_args(str(path), ["--max-num-seqs", "2"], environ)
    assert (config.max_num_seqs, config.seed, config.threads) == (2, 4, 8)
    assert config.server.api_keys == ("one", "two")


def test_every_setting_has_a_variable_and_a_model_may_come_from_it():
    variables = {variable_of(name): name for name in SETTINGS}
    assert environment_settings(dict.fromkeys(variables, "x")) == dict.fromkeys(SETTINGS, "x")
    assert config_from_args(None, [], {"TFSERVE_MODEL": "some/dir"}).model == "some/dir"
    with pytest.raises(ConfigError, match="model: is required"):
        config_from_args(None, [], {})


def test_a_list_in_the_environment_may_be_yaml():
    keys = "[sk-plain, {name: alice, key: sk-alice, weight: 2}]"
    plain, alice = config_from_args("m", [], {"TFSERVE_SERVER__API_KEYS": keys}).server.api_keys
    assert (plain, alice.name, alice.key) == ("sk-plain", "alice", "sk-alice")


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("TFSERVE_MAX_NUM_SEQ", "TFSERVE_MAX_NUM_SEQS"),
        ("TFSERVE_PORT", "TFSERVE_SERVER__PORT"),
        ("TFSERVE_SERVER_PORT", "TFSERVE_SERVER__PORT"),
        ("TFSERVE_SCHEDULER__POLCY", "TFSERVE_SCHEDULER__POLICY"),
    ],
)
def test_a_variable_that_is_no_setting_is_named_with_the_nearest(variable, nearest):
    with pytest.raises(ConfigError, match=rf"^{variable}: is not a setting.*did you mean {nearest}\?$"):
        environment_settings({variable: "secret"})


def test_a_bad_value_is_told_with_the_variable_it_is_from_and_a_key_is_not_shown():
    with pytest.raises(ConfigError, match=r"got 'many' \(in the environment variable TFSERVE_MAX_NUM_SEQS\)"):
        config_from_args("m", [], {"TFSERVE_MAX_NUM_SEQS": "many"})
    for value in ("[sk-secret", "[{name: a, key: sk-secret, weight: 0}]", "[{key: sk-secret}]", "sk-secret,"):
        with pytest.raises(ConfigError) as caught:
            config_from_args("m", [], {"TFSERVE_SERVER__API_KEYS": value})
        assert "sk-secret" not in str(caught.value)


def test_what_kubernetes_sets_for_a_service_called_tfserve_is_no_mistake():
    environ = {
        "TFSERVE_SERVICE_HOST": "10.0.0.1",
        "TFSERVE_SERVICE_PORT": "8000",
        "TFSERVE_SERVICE_PORT_HTTP": "8000",
        "TFSERVE_PORT": "tcp://10.0.0.1:8000",
        "TFSERVE_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "TFSERVE_PORT_8000_TCP_PROTO": "tcp",
        "TFSERVE_CANARY_SERVICE_HOST": "10.0.0.2",
        "TFSERVE_CANARY_PORT": "tcp://10.0.0.2:8000",
        "TFSERVE_CANARY_PORT_8000_TCP_ADDR": "10.0.0.2",
    }
    assert environment_settings(environ) == {}


def test_other_variables_are_the_ones_in_the_code():
    code = "\n".join(path.read_text() for path in (ROOT / "tfserve").rglob("*.py"))
    named = {name for name in re.findall(r"\bTFSERVE_[A-Z_]*[A-Z]\b", code) if name not in map(variable_of, SETTINGS)}
    assert named == OTHER_VARIABLES
    assert environment_settings(dict.fromkeys(OTHER_VARIABLES, "x")) == {}


def test_short_names_that_other_servers_have_are_understood(tmp_path):
    (tmp_path / "serve.yml").write_text("model: demo\nseed: 3\n")
    words = ["--port", "9000", "--host=::", "--api-key", "one,two", "--log-level", "debug"]
    config = config_from_args(None, ["--config", str(tmp_path / "serve.yml"), *words], {})
    server = config.server
    assert (server.port, server.host, server.api_keys, config.log_level) == (9000, "::", ("one", "two"), "debug")
    assert (config.model, config.seed) == ("demo", 3)
    assert config_from_args("other", ["--config", str(tmp_path / "serve.yml")], {}).model == "other"
    with pytest.raises(ConfigError, match=r"server\.port: is given twice"):
        parse_settings(["--port", "1", "--server.port", "2"])
    with pytest.raises(ConfigError, match="config: is given twice"):
        config_from_args("a.yaml", ["--config", "b.yaml"], {})

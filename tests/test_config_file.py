"""Configuration files: YAML 1.2's scalars, every key once, and an error with its place for anything else."""

from __future__ import annotations

import pytest

from tfserve.cli_config import config_from_args, parse_settings
from tfserve.config import load_config
from tfserve.errors import ConfigError


@pytest.fixture
def load(tmp_path):
    def load(text: str | bytes, **overrides):
        path = tmp_path / "serve.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config(path, overrides)

    return load


def setting(config, dotted: str):
    for name in dotted.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("engine_process: on", "engine_process", "on"),
        ("engine_process: off", "engine_process", "off"),
        ("server: {pacing: off}", "server.pacing", "off"),
        ("served_model_name: no", "served_model_name", "no"),
        ("served_model_name: 2024-01-01", "served_model_name", "2024-01-01"),
        ("served_model_name: 22:22", "served_model_name", "22:22"),
        ("served_model_name: 010", "served_model_name", "010"),
        ("served_model_name: !!str 7", "served_model_name", "7"),
        ("served_model_name: '7'", "served_model_name", "7"),
        ("served_model_name: null", "served_model_name", None),
        ("enforce_eager: yes", "enforce_eager", True),
        ("enforce_eager: On", "enforce_eager", True),
        ("scheduler: {ablation: {offload: off}}", "scheduler.ablation.offload", False),
        ("scheduler: {ablation: {offload: 'no'}}", "scheduler.ablation.offload", False),
        ("max_num_seqs: 0x10", "max_num_seqs", 16),
        ("max_num_seqs: 0o10", "max_num_seqs", 8),
        ("max_num_seqs: +5", "max_num_seqs", 5),
        ("max_num_seqs: 8.0", "max_num_seqs", 8),
        ("max_num_seqs: '8'", "max_num_seqs", 8),
        ("kv_cache_gib: 1e1", "kv_cache_gib", 10.0),
        ("kv_cache_gib: .5", "kv_cache_gib", 0.5),
        ("server: {api_keys: ['12345', on]}", "server.api_keys", ("12345", "on")),
    ],
)
def test_words_are_those_of_yaml_1_2(load, line, key, value):
    assert setting(load(f"model: demo\n{line}\n"), key) == value


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("server: {port: 22:22}", "server.port"),
        ("server:\n  port: 010", "server.port"),
        ("max_num_seqs: 1_000", "max_num_seqs"),
        ("max_num_seqs: true", "max_num_seqs"),
        ("max_num_seqs: [1]", "max_num_seqs"),
        ("max_num_seqs:", "max_num_seqs"),
        ("kv_cache_gib: 1:30", "kv_cache_gib"),
        ("kv_cache_gib: .inf", "kv_cache_gib"),
        ("kv_cache_gib: -.INF", "kv_cache_gib"),
        ("kv_cache_gib: .nan", "kv_cache_gib"),
        ("server: {drain_timeout: .inf}", "server.drain_timeout"),
        ("server: {keep_alive_s: 1e999}", "server.keep_alive_s"),
        ("seed: 99999999999999999999", "seed"),
        ("served_model_name: 1.0", "served_model_name"),
        ("enforce_eager: maybe", "enforce_eager"),
        ("pacing: off", "pacing"),
        ("server: {pacing: on}", "server.pacing"),
        ("quantization: awq", "quantization"),
        ("server: {host: [a]}", "server.host"),
        ("server: {api_keys: 12345}", "server.api_keys"),
        ("server: {api_keys: abc}", "server.api_keys"),
        ("server: {api_keys: [12345]}", "server.api_keys[0]"),
        ("server: {api_keys: [a, null]}", "server.api_keys[1]"),
        ("server:", "server"),
        ("scheduler: null", "scheduler"),
        ("1: 2", "1"),
        ("null: 2", "None"),
    ],
)
def test_what_a_setting_cannot_be_is_refused_by_its_name(load, line, key):
    with pytest.raises(ConfigError) as caught:
        load(f"model: demo\n{line}\n")
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("model: m\nserver:\n  api_keys: [a]\nserver:\n  port: 1\n", 4, "'server' is given again, after line 2"),
        ("model: m\nseed: 1\nseed: 1\n", 3, "'seed' is given again, after line 2"),
        ("model: m\nserver:\n  port: 1\n  host: a\n  'port': 2\n", 5, "'port' is given again, after line 3"),
        ("model: m\nscheduler: {watermark: 0, watermark: 0.1}\n", 2, "'watermark' is given again"),
        ("model: m\nserver:\n\tport: 1\n", 3, ""),
        ("model: m\n---\nmodel: n\n", 2, ""),
        ("model: m\n? [a]\n: 2\n", 2, "a key must be text"),
        ("model: m\nseed: !!int 22:22\n", 2, "the tag must go"),
        ("model: m\nseed: !!python/object:os.system x\n", 2, ""),
        ("model: m\nenforce_eager: !!bool maybe\n", 2, ""),
        ("model: m\nserver: !!set {a, b}\n", 2, ""),
        ("model: m\nx: *unknown\n", 2, ""),
        ("model: [unclosed", 1, ""),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(load, text, line, says):
    with pytest.raises(ConfigError, match=rf"serve\.yaml is not valid YAML: line {line}: .*{says}"):
        load(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "# a comment\n", "words", "[a]", "model:", "model: 12", "model: ~", "[" * 3000, "{a: " * 3000),
        *(b"\xff\xfe\x00", "model: é\n".encode("utf-16-le"), "model: é\n".encode("latin-1")),
        *(b"GGUF\x00\x01", b"x" * 2_000_000),
        "model: m\nseed: " + "1" * 5000,
        "model: m\nseed: 0x" + "1" * 5000,
        'model: "\\U00110000"',
        'model: "\\UFFFFFFFF"',
    ],
    ids=lambda text: repr(text)[:20],
)
def test_what_is_no_configuration_is_an_error_of_one_line(load, text):
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_file_may_have_a_byte_order_mark(load, encoding):
    assert load("model: modèle\n".encode(encoding)).model == "modèle"


def test_merge_keys_work_and_the_mappings_own_keys_win(load):
    text = "model: m\nscheduler: &base\n  <<: {schedule_interval_s: 2, max_rate: 9}\n  schedule_interval_s: 3\n"
    scheduler = load(text).scheduler
    assert (scheduler.schedule_interval_s, scheduler.max_rate) == (3.0, 9.0)


def test_of_several_merged_mappings_the_first_wins(load):
    text = "model: m\n<<: [{dtype: float32, seed: 1}, {dtype: float16, seed: 2, threads: 3}]\nseed: 4\n"
    config = load(text)
    assert (config.dtype, config.seed, config.threads) == ("float32", 4, 3)


def test_an_error_does_not_write_out_what_aliases_repeat(load):
    lines = [f"  - &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True)]
    with pytest.raises(ConfigError, match="model: must be a string") as caught:
        load("\n".join(["model:", "  - &a [x]", *lines]))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("key", ["server.host", "server.cors_origins", "model", "step_trace", "server.api_keys"])
def test_text_that_is_no_unicode_is_refused_wherever_it_is(load, key):
    with pytest.raises(ConfigError, match="valid UTF-8 text") as caught:
        load("model: m\n", **{key: "a\udc80"})
    assert caught.value.key == key


@pytest.mark.parametrize("text", ["model: m\nserver: {api_keys: [!!int sk-1]}", "model: m\nserver: {api_keys: sk-1}"])
def test_a_key_of_the_api_is_in_no_error(load, text):
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert "sk-1" not in str(caught.value)
    with pytest.raises(ConfigError, match="given twice") as caught:
        parse_settings(["--server.api-keys=sk-1", "--server.api-keys=sk-2"])
    assert "sk-" not in str(caught.value)


@pytest.mark.parametrize("form", ["{{<<: [*a{0}, *a{0}]}}", "[*a{0}, *a{0}, *a{0}]", "{{k: *a{0}, l: *a{0}}}"])
def test_anchors_of_anchors_stay_small(load, form):
    lines = ["model: m", "server:", "  api_keys: *a40"]
    anchors = [f"x{i}: &a{i} {form.format(i - 1)}" for i in range(1, 41)]
    with pytest.raises(ConfigError):
        load("\n".join(["x0: &a0 {k: v}", *anchors, *lines]))


@pytest.mark.parametrize(
    "words",
    [
        ["--server.port", "1", "--server.port", "2"],
        ["--server.port=1", "--server.port=1"],
        ["--max-num-seqs", "1", "--max_num_seqs", "1"],
    ],
)
def test_a_setting_given_twice_on_the_command_line_is_refused(words):
    with pytest.raises(ConfigError, match="is given twice"):
        parse_settings(words)


def test_the_model_is_the_target_or_a_setting_but_not_both(tmp_path):
    with pytest.raises(ConfigError, match="model: is given twice: 'a/b' and --model 'c'"):
        config_from_args("a/b", ["--model", "c"])
    (tmp_path / "serve.yaml").write_text("model: m\n")
    assert config_from_args(str(tmp_path / "serve.yaml"), ["--model", "c"]).model == "c"

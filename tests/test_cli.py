"""Exit codes: 2 if the user must change something, 1 if a retry may succeed, as in operations.md."""

from __future__ import annotations

import msgspec
import pytest

from tfserve import cli
from tfserve.config import SETTINGS, EngineConfig
from tfserve.engine.engine import Engine
from tfserve.engine.frontend.core_client import _startup_error
from tfserve.errors import (
    ConfigError,
    DownloadError,
    EngineDeadError,
    ModelError,
    QueueFullError,
    RequestError,
    TfserveError,
)
from tfserve.http.server import serve
from tfserve.messages import Failed
from tfserve.model.loading import demo

ERRORS = [
    (ConfigError("seed", "is bad"), 2),
    (ModelError("no tensors"), 2),
    (RequestError("prompt", "is empty"), 2),
    (TfserveError("--output: cannot write"), 2),
    (DownloadError("no network"), 1),
    (EngineDeadError("killed"), 1),
    (QueueFullError("full", 1.0), 1),
]


@pytest.mark.parametrize("command", ["serve", "generate", "bench engine"])
@pytest.mark.parametrize(
    ("target", "settings"),
    [
        ("/nonexistent", []),
        ("{tmp}/model.gguf", []),
        ("{tmp}", []),
        ("{tmp}/nowhere.yaml", []),
        ("{tmp}/twice.yaml", []),
        ("demo", ["--max-num-seqs", "0"]),
        ("demo", ["--seed", "1", "--seed", "2"]),
        ("demo", ["--quantization", "awq"]),
    ],
)
def test_what_must_be_changed_first_is_2_in_every_command(tmp_path, capsys, command, target, settings):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "twice.yaml").write_text("model: m\nseed: 1\nseed: 2\n")
    words = [*command.split(), target.format(tmp=tmp_path), *(["hello"] if command == "generate" else [])]
    port = ["--server.port", "0"]
    assert cli.main([*words, *settings, *port]) == 2
    assert capsys.readouterr().err.startswith("tfserve: error: ")


def test_a_file_that_cannot_be_imported_is_2(tmp_path, capsys):
    (tmp_path / "x.gguf").write_bytes(b"no GGUF")
    assert cli.main(["import-gguf", str(tmp_path / "x.gguf"), str(tmp_path / "out")]) == 2
    assert cli.main(["import-gguf", str(tmp_path / "none.gguf"), str(tmp_path / "out")]) == 2
    assert "tfserve: error: " in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=lambda value: type(value).__name__)
def test_every_error_has_the_same_code_in_every_command(monkeypatch, error, code):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(demo, "prepare_demo_model", fail)
    monkeypatch.setattr(Engine, "__init__", fail)
    assert cli.main(["demo-model"]) == code
    assert cli.main(["generate", "demo", "hello"]) == code
    assert serve(EngineConfig(model="m", server={"port": 0}), fail) == code


@pytest.mark.parametrize(
    ("failed", "kind"),
    [
        (Failed("is bad", "seed", ConfigError.exit_code), ConfigError),
        (Failed("no tensors", None, ModelError.exit_code), ModelError),
        (Failed("RuntimeError: out of memory"), EngineDeadError),
    ],
)
def test_an_engine_process_passes_on_whether_its_error_may_go_away(failed, kind):
    assert type(_startup_error(failed)) is kind


def test_interrupted_is_130(monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "prepare_demo_model", interrupt)
    assert cli.main(["demo-model"]) == 130


def test_the_help_of_serve_lists_every_setting_with_its_default_and_its_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 120
    words = " ".join(shown.split())
    assert f"--model {SETTINGS['model'].help}" in words
    for setting in SETTINGS.values():
        if setting.default is msgspec.NODEFAULT:
            continue
        flag, default = "--" + setting.name.replace("_", "-"), msgspec.json.encode(setting.default).decode().strip('"')
        names = {"server.port": ", --port", "server.host": ", --host", "server.api_keys": ", --api-key"}
        assert f"{flag}{names.get(setting.name, '')} {default} {setting.help}" in words
        assert all(str(choice) in words for choice in setting.choices)


@pytest.mark.parametrize("command", ["serve", "generate", "bench engine"])
@pytest.mark.parametrize(
    "words",
    [["--max-num-sq", "3", "{tmp}"], ["{tmp}", "--max_num_sq=3"], ["--seed", "1", "{tmp}", "--max-num-sq", "3"]],
)
def test_an_unknown_setting_is_named_wherever_it_stands(tmp_path, capsys, command, words):
    words = [word.format(tmp=tmp_path) for word in words]
    assert cli.main([*command.split(), *words, *(["hello"] if command == "generate" else [])]) == 2
    assert "max_num_sq: is not a setting; did you mean max_num_seqs?" in capsys.readouterr().err


def test_settings_may_stand_before_the_model(tmp_path, monkeypatch):
    served = []
    monkeypatch.setattr("tfserve.http.server.serve", lambda config: served.append(config) or 0)
    monkeypatch.setenv("TFSERVE_SEED", "7")
    assert cli.main(["serve", "--port", "9000", str(tmp_path), "--max-num-seqs=3"]) == 0
    (config,) = served
    assert (config.model, config.server.port, config.max_num_seqs, config.seed) == (str(tmp_path), 9000, 3, 7)

"""Settings as the words of a command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tfserve.config import EngineConfig, load_config
from tfserve.errors import ConfigError


def parse_settings(words: Sequence[str]) -> dict[str, str]:
    """Turn `--max-num-seqs 16 --server.port=9000` into settings. Raises ConfigError for a word that is no setting."""
    settings: dict[str, str] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError("", f"unexpected argument {word!r}: settings are given as --key value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not queue or queue[0].startswith("--"):
                raise ConfigError(key, "needs a value: --key value")
            value = queue.pop(0)
        name = key.replace("-", "_")
        if name in settings:
            given = "" if name == "server.api_keys" else f": {settings[name]!r} and {value!r}"
            raise ConfigError(name, f"is given twice{given}; keep one of them")
        settings[name] = value
    return settings


def config_from_args(target: str, words: Sequence[str]) -> EngineConfig:
    """The config of a YAML file, or of a model directory, hub id or "demo", with settings from the command line."""
    settings: dict[str, Any] = dict(parse_settings(words))
    if Path(target).suffix in {".yaml", ".yml"}:
        return load_config(Path(target), settings)
    if "model" in settings:
        raise ConfigError("model", f"is given twice: {target!r} and --model {settings['model']!r}; keep one of them")
    return load_config(None, {"model": target, **settings})

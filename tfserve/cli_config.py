"""Settings on the command line, in environment variables, and in the list of --help."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from tfserve.config import RENAMED, SETTINGS, EngineConfig, load_config, nearest_setting, variable_of
from tfserve.errors import ConfigError

SHORT_NAMES = {"host": "server.host", "port": "server.port", "api_key": "server.api_keys"}
"""Short names on the command line, as in other servers."""

OTHER_VARIABLES = frozenset({"TFSERVE_API_KEYS", "TFSERVE_CACHE"})
"""Environment variables that are not settings (http/keys.py, model/loading/cache_dir.py)."""

_SERVICE_LINK = re.compile(r"(_SERVICE_HOST|_SERVICE_PORT(_\w+)?|_PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)$")
"""Suffixes of the variables that Kubernetes sets in every container for a Service called tfserve, or tfserve-..."""

_FILE = "config"
_WIDTH = 120


def split_settings(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split words into settings, at any place, and all others. A word with an unknown name counts as another."""
    settings: list[str] = []
    others: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        is_setting = word.startswith("--") and _name_of(word[2:].partition("=")[0]) in {*SETTINGS, *RENAMED, _FILE}
        (settings if is_setting else others).append(word)
        if is_setting and "=" not in word and queue and not queue[0].startswith("--"):
            settings.append(queue.pop(0))
    return settings, others


def parse_settings(words: Sequence[str]) -> dict[str, str]:
    """Turn `--max-num-seqs 16 --server.port=9000` into settings. Raises ConfigError for an unknown name."""
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
        name = _name_of(key)
        if name in settings:
            given = "" if name == "server.api_keys" else f": {settings[name]!r} and {value!r}"
            raise ConfigError(name, f"is given twice{given}; keep one of them")
        settings[name] = value
    return settings


def _name_of(key: str) -> str:
    name = key.replace("-", "_")
    return SHORT_NAMES.get(name, name)


def environment_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Settings from environment variables, by their dotted names. Raises ConfigError for one that is not a setting."""
    known = {variable_of(name): name for name in (*SETTINGS, *RENAMED)}
    settings: dict[str, str] = {}
    for variable, value in environ.items():
        if variable in known:
            settings[known[variable]] = value
        elif variable.startswith("TFSERVE_") and variable not in OTHER_VARIABLES:
            is_link = _SERVICE_LINK.search(variable) or (variable.endswith("_PORT") and "://" in value)
            if not is_link:
                near = nearest_setting(variable.removeprefix("TFSERVE_").lower().replace("__", "."))
                hint = f"did you mean {variable_of(near)}?" if near else "unset it, or see `tfserve serve --help`"
                raise ConfigError(variable, f"is not a setting, nor another variable of tfserve; {hint}")
    return settings


def config_from_args(target: str | None, words: Sequence[str], environ: Mapping[str, str] = os.environ) -> EngineConfig:
    """The config of a YAML file, or of a model directory, hub id or "demo", with settings from the command line.

    The file is `target`, or is named by `--config`. The environment beats it, and the command line beats both.
    """
    settings: dict[str, Any] = dict(parse_settings(words))
    file = settings.pop(_FILE, None)
    is_file = target is not None and Path(target).suffix in {".yaml", ".yml"}
    if is_file and file is not None:
        raise ConfigError(_FILE, f"is given twice: {target!r} and --config {file!r}; keep one of them")
    if target is not None and not is_file:
        if "model" in settings:
            message = f"is given twice: {target!r} and --model {settings['model']!r}; keep one of them"
            raise ConfigError("model", message)
        settings["model"] = target
    path = target if is_file else file
    return load_config(None if path is None else Path(path), settings, environment_settings(environ))


def settings_help() -> str:
    """Every setting with its default and its help, a line each, for the end of a command's help."""
    lines = ["settings, each as --key value with its default here; a list has commas between its parts:"]
    lines += _row("config FILE", "", "a YAML file; the environment beats it, and what is here beats both")
    short = {name: f", --{key.replace('_', '-')}" for key, name in SHORT_NAMES.items()}
    for setting in SETTINGS.values():
        default = "" if setting.default is msgspec.NODEFAULT else _plain(setting.default)
        choices = f" ({', '.join(map(str, setting.choices))})" if len(setting.choices) > 1 else ""
        names = setting.name.replace("_", "-") + short.get(setting.name, "")
        lines += _row(names, default, setting.help + choices)
    lines.append(f"in the environment they are called as in {variable_of('seed')} and {variable_of('server.port')}")
    return "\n".join(lines)


def _row(names: str, default: str, text: str) -> list[str]:
    start = f"  --{names:<45}{default:<11} "
    indent = " " * len(start)
    return textwrap.wrap(text, _WIDTH, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False)


def _plain(default: Any) -> str:
    """A default as a YAML file has it."""
    return msgspec.json.encode(default).decode().strip('"')

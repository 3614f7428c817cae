"""Reads a configuration file: YAML 1.2's core schema, no key twice.

PyYAML reads YAML 1.1: `on` is true, `22:22` is 1342, `010` is 8, `2024-01-01` is a date, and the last of two equal keys
wins. Here such words are text, and a second `server:` is an error. Merge keys (`<<`) work.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tfserve.errors import ConfigError

_MAX_BYTES = 1 << 20
"""A configuration has a few thousand bytes. A larger file, such as a model given by mistake, is not read."""

_MAX_DIGITS = 100
"""Python refuses to print integers of several thousand digits, also in an error message."""

_MERGE = "tag:yaml.org,2002:merge"

_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)
"""Tag, pattern, and first characters. Digits with a leading zero are text: 010 can mean 8 or 10."""


class _Loader(yaml.SafeLoader):
    """A SafeLoader with the scalars above that refuses repeated keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  # as PyYAML declares it

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse a key that the mapping itself gives twice. Merged keys are not in it yet."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _mistake(key, "a key must be text")
            if (key.tag, key.value) in lines:
                first = lines[key.tag, key.value]
                raise _mistake(key, f"{key.value!r} is given again, after line {first}; keep one of them")
            lines[key.tag, key.value] = key.start_mark.line + 1
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        """Refuse every tag in the file (`!!int`) except `!!str`: the setting decides the type of its value."""
        implicit = self.peek_event().implicit  # type: ignore[no-untyped-call]
        node: yaml.ScalarNode = super().compose_scalar_node(anchor)
        if not any(implicit) and node.tag != "tag:yaml.org,2002:str":
            raise _mistake(node, "the tag must go: a setting says what its value is")  # it may be an API key
        return node

    def read_bool(self, node: yaml.ScalarNode) -> bool:
        """The words true and false."""
        return self.construct_scalar(node).lower() == "true"

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Add the mappings that `<<` names. The mapping's own keys win, then the first of several mappings."""
        merges = [value for key, value in node.value if key.tag == _MERGE]
        node.value = [(key, value) for key, value in node.value if key.tag != _MERGE]
        has = {(key.tag, key.value) for key, _ in node.value}
        for source in merges:
            for each in source.value if isinstance(source, yaml.SequenceNode) else [source]:
                if not isinstance(each, yaml.MappingNode):
                    raise _mistake(each, "`<<` takes a mapping, or a list of them")
                self.flatten_mapping(each)
                new = [(key, value) for key, value in each.value if (key.tag, key.value) not in has]
                node.value += new
                has.update((key.tag, key.value) for key, _ in new)

    def read_int(self, node: yaml.ScalarNode) -> int:
        """An integer in decimal, or with 0o or 0x before it."""
        text = self.construct_scalar(node)
        if len(text) > _MAX_DIGITS:
            raise _mistake(node, f"an integer of {len(text)} digits is no setting")
        return int(text, 0 if text[:2] in {"0o", "0x"} else 10)

    def read_float(self, node: yaml.ScalarNode) -> float:
        """A number, .inf or .nan."""
        return float(re.sub(r"\.(?=inf|nan)", "", self.construct_scalar(node).lower()))


def _mistake(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


_READERS: dict[str, Callable[..., Any]] = {
    "null": _Loader.construct_yaml_null,
    "bool": _Loader.read_bool,
    "int": _Loader.read_int,
    "float": _Loader.read_float,
    "str": _Loader.construct_yaml_str,
    "seq": _Loader.construct_yaml_seq,
    "map": _Loader.construct_yaml_map,
}
"""Dates, sets and bytes are refused: no setting has such a type."""

_Loader.yaml_constructors = {None: _Loader.construct_undefined}
for _tag, _reader in _READERS.items():
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _reader)
for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


def read_secrets(raw: bytes, source: str) -> Any:
    """The value of a YAML text that errors must not quote. Raises ConfigError naming `source` and the line."""
    try:
        return yaml.load(raw, _Loader)
    except yaml.MarkedYAMLError as error:
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError("", f"{source} is not valid YAML{where}") from None
    except (RecursionError, yaml.YAMLError, ValueError, OverflowError):
        raise ConfigError("", f"{source} is not valid YAML") from None


def read_list(text: str, source: str) -> Any:
    """A list from one text: items separated by commas, or a YAML list. Raises ConfigError, without quoting the text."""
    is_yaml = text.startswith(("[", "- "))
    return read_secrets(text.encode(errors="surrogateescape"), source) if is_yaml else text.split(",")


def read_file(path: Path) -> bytes:
    """The bytes of a configuration file. Raises ConfigError naming the file."""
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError("", f"cannot read {path}: {error.strerror}") from None
    if len(raw) > _MAX_BYTES:
        raise ConfigError("", f"{path} is larger than 1 MiB: that is no configuration")
    return raw


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises ConfigError naming the file, and the line where there is one."""
    raw = read_file(path)
    try:
        tree = yaml.load(raw, _Loader)
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError("", f"{path} is not valid YAML: {where}{error.problem or error.context}") from None
    except RecursionError:
        raise ConfigError("", f"{path} is not valid YAML: it is nested too deep") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # invalid UTF-8, or \U with an invalid code
        raise ConfigError("", f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError("", f"{path} must hold `key: value` lines, starting with `model:`")
    return tree

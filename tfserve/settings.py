"""What every group of settings is checked for, and the entries of those that are lists."""

from __future__ import annotations

import re
from typing import ClassVar

from tfserve.checked import Checked
from tfserve.errors import ConfigError
from tfserve.strict_json import is_text


class Settings(Checked, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings, checked wherever they are made: what a file may not say, Python may not say either."""

    section: ClassVar[str] = ""
    """What the names of the settings begin with."""

    def __post_init__(self) -> None:
        """Raise ConfigError for the first setting whose value is of another type, or a number beyond 64 bits."""
        super().__post_init__()
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ConfigError(
                    self.section + name, f"must be a 64-bit integer, got one of {value.bit_length() + 1} bits"
                )
            # A command line's bytes that are no UTF-8 arrive as half surrogate pairs, which no answer can hold.
            texts = value if isinstance(value, tuple) else (value,)
            if not all(is_text(text) for text in texts if isinstance(text, str)):
                raise ConfigError(self.section + name, "must be valid UTF-8 text; give it another name")

    def mistake(self, key: str, message: str) -> Exception:
        """See Checked."""
        return ConfigError(self.section + key, message)


class ApiKey(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of `server.api_keys`: a tenant, known in logs and metrics by its `name`.

    What is short is shared between tenants by `weight`. `admin` sees and ends the streams of all. None: no limit;
    `max_streams` counts choices under way, `tokens_per_minute` those of prompts and answers.
    """

    section: ClassVar[str] = "server.api_keys: "

    name: str
    key: str
    weight: float = 1.0
    admin: bool = False
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_streams: int | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError, which never quotes the key, for a value that cannot be meant."""
        super().__post_init__()
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", self.name):
            raise self.mistake("name", "must be 1 to 64 letters, digits, '.', '_' or '-'")
        check_key(self.key)
        if not 2.0**-10 <= self.weight <= 2.0**10:
            raise self.mistake("weight", f"must be 1/1024 to 1024, got {self.weight} (of {self.name!r})")
        for limit in ("requests_per_minute", "tokens_per_minute", "max_streams"):
            value = getattr(self, limit)
            if value is not None and value < 1:
                raise self.mistake(limit, f"must be at least 1, got {value} (of {self.name!r})")

    def __repr__(self) -> str:
        return f"ApiKey({self.name!r})"


def check_key(key: str) -> None:
    """Raise ConfigError unless `key` can be sent in a header."""
    if not (key and key.isascii() and key.isprintable() and " " not in key):
        # An empty one would open the server to every client: `--server.api_keys "$KEY"` with KEY unset.
        raise ConfigError("server.api_keys", "a key is empty or has characters other than visible ASCII")

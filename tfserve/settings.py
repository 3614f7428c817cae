"""The base of every group of settings and its checks, and the entries of settings that are lists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args, get_origin

import msgspec
from msgspec import Meta

from tfserve.checked import Checked
from tfserve.errors import ConfigError
from tfserve.strict_json import is_text

_HIGHEST = 10**9
"""For times and weights: infinity and NaN are invalid."""

Count = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[float, Meta(ge=0, le=_HIGHEST)]
AboveZero = Annotated[float, Meta(gt=0, le=_HIGHEST)]
Share = Annotated[float, Meta(ge=0, lt=1)]


def about(text: str) -> Meta:
    """A setting's help: one line that says what it does."""
    return Meta(description=text)


class Setting(NamedTuple):
    """One setting as it was declared. `kind` is its type without bounds; `default` is NODEFAULT where it has none."""

    name: str
    kind: Any
    default: Any
    help: str

    @property
    def is_list(self) -> bool:
        """True if its value is a list."""
        return get_origin(self.kind) is tuple

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values that it allows, if they are listed."""
        kinds = (self.kind, *get_args(self.kind))
        return next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())


class Settings(Checked, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of settings; Python values are checked as those of a file are."""

    section: ClassVar[str] = ""
    """Prefix of the settings' dotted names."""

    def __post_init__(self) -> None:
        """Raise ConfigError for the first setting whose value is of another type, or a number beyond 64 bits."""
        super().__post_init__()
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ConfigError(
                    self.section + name, f"must be a 64-bit integer, got one of {value.bit_length() + 1} bits"
                )
            # Invalid UTF-8 on the command line becomes half surrogate pairs, which JSON answers cannot contain.
            texts = value if isinstance(value, tuple) else (value,)
            if not all(is_text(text) for text in texts if isinstance(text, str)):
                raise ConfigError(self.section + name, "must be valid UTF-8 text; give it another name")

    def mistake(self, key: str, message: str) -> Exception:
        """See Checked."""
        return ConfigError(self.section + key, message)


def settings_of(struct: type[Settings]) -> Iterator[Setting]:
    """The settings of a struct by their dotted names, without those of its sections."""
    for field in msgspec.structs.fields(struct):
        kind, *rules = get_args(field.type) or (field.type,)
        help_text = next((rule.description for rule in rules if isinstance(rule, Meta) and rule.description), None)
        if help_text is not None:
            yield Setting(struct.section + field.name, kind, field.default, help_text)


class ApiKey(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of `server.api_keys`: a tenant. `name` identifies it in logs and metrics.

    Tenants share the device by `weight`. `admin` can see and end all streams. `max_streams` limits live choices,
    `tokens_per_minute` the tokens of prompts and answers; None: no limit.
    """

    section: ClassVar[str] = "server.api_keys: "

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}\Z")]
    key: str
    weight: Annotated[float, Meta(ge=2.0**-10, le=2.0**10)] = 1.0
    admin: bool = False
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    max_streams: Count | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError for an invalid value; the message never quotes the key."""
        super().__post_init__()
        check_key(self.key)

    def __repr__(self) -> str:
        return f"ApiKey({self.name!r})"


def check_key(key: str) -> None:
    """Raise ConfigError unless `key` can be sent in a header."""
    if not (key and key.isascii() and key.isprintable() and " " not in key):
        # An empty key would admit every client: `--server.api_keys "$KEY"` with KEY unset.
        raise ConfigError("server.api_keys", "a key is empty or has characters other than visible ASCII")

"""API keys: which tenant a request belongs to, and what its caller may see. Keys are compared, never shown."""

from __future__ import annotations

import functools
import hashlib
import hmac
import ipaddress
import logging
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from tfserve.config import EngineConfig
from tfserve.config_file import read_file, read_list, read_secrets
from tfserve.errors import ConfigError
from tfserve.http.limits import Limits
from tfserve.misfit import find_misfit
from tfserve.settings import ApiKey, check_key
from tfserve.types import Tenant

log = logging.getLogger(__name__)

ENVIRONMENT = "TFSERVE_API_KEYS"
"""The environment variable that may hold keys: a YAML list as in the settings, or plain keys with commas between."""


@dataclass(slots=True)
class Caller:
    """The client of a request. `key_name` is None where no keys are asked for."""

    tenant: Tenant
    key_name: str | None = None
    sees_all: bool = True
    limits: Limits = field(default_factory=Limits)

    def may_see(self, tenant: Tenant) -> bool:
        """True if this caller may see and end that tenant's streams."""
        return self.sees_all or tenant == self.tenant


CALLER = web.RequestKey("caller", Caller)
"""Where the caller is noted on a request that needs one."""


class Keyring:
    """All keys of a server: from the settings, a file and the environment. Raises ConfigError, which quotes none."""

    def __init__(self, config: EngineConfig, environ: Mapping[str, str] = os.environ) -> None:
        server = config.server
        given = list(server.api_keys)
        if server.api_keys_file is not None:
            given += _from_file(Path(server.api_keys_file))
        if text := environ.get(ENVIRONMENT):
            given += _entries(read_list(text, ENVIRONMENT), ENVIRONMENT)
        entries = [
            ApiKey(name=f"key-{number}", key=each) if isinstance(each, str) else each
            for number, each in enumerate(given, 1)
        ]
        for what in ("name", "key"):
            if len({getattr(entry, what) for entry in entries}) < len(entries):
                message = f"two entries have the same {what}; give each its own (a plain key at place N is 'key-N')"
                raise ConfigError("server.api_keys", message)
        self._callers = [(_digest(entry.key), _caller(entry)) for entry in entries]

    def __len__(self) -> int:
        return len(self._callers)

    def find(self, authorization: str) -> Caller | None:
        """The caller that an Authorization header names; None if its key is none of these."""
        scheme, _, given = authorization.partition(" ")
        digest = _digest(given)
        found: Caller | None = None
        # All are compared, each in constant time: the time taken tells nothing about any key.
        for known, caller in self._callers:
            if hmac.compare_digest(digest, known):
                found = caller
        return found if scheme.lower() == "bearer" else None


@functools.lru_cache(4096)
def peer(address: str | None) -> Caller:
    """The caller at an address, where no keys are asked for: it sees all, and shares with other addresses.

    All of this machine's own addresses are one tenant, and so is a /64 of IPv6, which a single client may hold.
    """
    try:
        ip = ipaddress.ip_address((address or "").partition("%")[0])
    except ValueError:
        return Caller(Tenant())
    if isinstance(ip, ipaddress.IPv6Address):
        ip = ip.ipv4_mapped or ip
    if ip.is_loopback:
        return Caller(Tenant())
    if isinstance(ip, ipaddress.IPv6Address):
        return Caller(Tenant(str(ipaddress.ip_network((ip, 64), strict=False))))
    return Caller(Tenant(str(ip)))


def _caller(entry: ApiKey) -> Caller:
    limits = Limits(entry.requests_per_minute, entry.tokens_per_minute, entry.max_streams)
    return Caller(Tenant(entry.name, entry.weight), entry.name, entry.admin, limits)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def _from_file(path: Path) -> Sequence[str | ApiKey]:
    source = f"server.api_keys_file ({path})"
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError("server.api_keys_file", f"cannot read {path}: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise ConfigError("server.api_keys_file", f"{path} is no file")
    if mode & 0o077:
        log.warning("Other users may read the keys in %s; chmod 600 it", path)
    return _entries(read_secrets(read_file(path), source), source)


def _entries(plain: Any, source: str) -> Sequence[str | ApiKey]:
    """Keys of plain data."""
    kind = list[str | ApiKey]
    try:
        entries: list[str | ApiKey] = msgspec.convert(plain, kind)
        for entry in entries:
            if isinstance(entry, str):
                check_key(entry)
    except msgspec.ValidationError:
        misfit = find_misfit(plain, kind)
        where = f"{misfit.path} {misfit.rule}".lstrip() if misfit else "must be a list of keys"
        raise ConfigError("", f"{source}: {where}") from None
    except ConfigError as error:
        raise ConfigError("", f"{source}: {error}") from None
    return entries

"""Listening, and the descriptors that connections need."""

from __future__ import annotations

import errno
import resource
import socket
from typing import Any

import pytest

from tfserve.http import sockets
from tfserve.http.sockets import OTHER_DESCRIPTORS, allow_connections


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The process's limits, soft and hard, as a test sets them: the last is the one that holds."""
    held: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: held[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: held.append(both))
    return held


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "allowed", "raised"),
    [
        (1024, 2**20, 4096, 4096, 4096 + OTHER_DESCRIPTORS),
        (1024, resource.RLIM_INFINITY, 4096, 4096, 4096 + OTHER_DESCRIPTORS),
        (1024, 2048, 4096, 2048 - OTHER_DESCRIPTORS, 2048),
        (1024, 1024, 100, 100, 1024),
        (256, 256, 4096, 32, 256),
        (2**20, 2**20, 4096, 4096, 2**20),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 4096, 4096, resource.RLIM_INFINITY),
    ],
)
def test_connections_get_the_descriptors_they_need_or_are_fewer(
    limits: list[tuple[int, int]], soft: int, hard: int, wanted: int, allowed: int, raised: int
) -> None:
    limits.append((soft, hard))
    assert allow_connections(wanted) == allowed
    assert limits[-1] == (raised, hard)


def test_a_limit_that_the_system_does_not_let_us_raise_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert allow_connections(4096) == 1024 - OTHER_DESCRIPTORS


@pytest.mark.parametrize("missing", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
def test_a_name_with_an_address_of_a_family_that_is_switched_off_is_served_on_the_other(
    monkeypatch: pytest.MonkeyPatch, missing: int
) -> None:
    create = socket.create_server

    def create_server(address: Any, *, family: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(missing, "no IPv6")
        return create(address, family=family)

    both = [(family, 1, 6, "", (host, 0)) for family, host in ((socket.AF_INET6, "::1"), (socket.AF_INET, "127.0.0.1"))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    monkeypatch.setattr(socket, "create_server", create_server)
    (opened,) = sockets._open("localhost", 0)
    with opened:
        assert opened.getsockname()[0] == "127.0.0.1"

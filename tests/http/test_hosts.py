"""Names a request may come by: a page whose name is made to point here (DNS rebinding) may not call the server."""

from __future__ import annotations

from typing import Any

import pytest

from tests.http.conftest import StartServer
from tfserve.config import config_from
from tfserve.errors import ConfigError

LOCAL: dict[str, Any] = {}
"""The default: 127.0.0.1, no keys."""


@pytest.mark.parametrize(
    ("settings", "host", "is_right"),
    [
        (LOCAL, "localhost", True),
        (LOCAL, "LocalHost.:8000", True),
        (LOCAL, "app.localhost:8000", True),
        (LOCAL, "host.docker.internal:8000", True),
        (LOCAL, "127.0.0.1:8000", True),
        (LOCAL, "[::1]:8000", True),
        (LOCAL, "10.1.2.3", True),
        (LOCAL, "evil.example:8000", False),
        (LOCAL, "localhost.evil.example", False),
        (LOCAL, "127.0.0.1.evil.example", False),
        (LOCAL, "evillocalhost", False),
        (LOCAL, "[evil.example]:8000", False),
        (LOCAL, "[::1].evil.example", False),
        (LOCAL, "[::1]:80@evil.example", False),
        (LOCAL, "evil.example#.localhost", False),
        (LOCAL, "evil.example/.localhost", False),
        (LOCAL, "evil.example:80.localhost", False),
        ({"host": "localhost"}, "evil.example", False),
        ({"host": "::1"}, "evil.example", False),
        ({"allowed_hosts": ["models.example"]}, "Models.Example:443", True),
        ({"allowed_hosts": ["models.example"]}, "localhost", True),
        ({"allowed_hosts": ["models.example"]}, "other.example", False),
        ({"allowed_hosts": ["*"]}, "evil.example", True),
        ({"api_keys": ["key"]}, "evil.example", True),
        ({"api_keys": ["key"], "allowed_hosts": ["models.example"]}, "evil.example", False),
        ({"host": "0.0.0.0"}, "tfserve.default.svc:8000", True),
        ({"host": "0.0.0.0", "allowed_hosts": ["tfserve"]}, "tfserve:8000", True),
        ({"host": "0.0.0.0", "allowed_hosts": ["tfserve"]}, "10.1.2.3:8000", True),
        ({"host": "0.0.0.0", "allowed_hosts": ["tfserve"]}, "evil.example", False),
        ({"host": "gpu-box", "allowed_hosts": ["tfserve"]}, "gpu-box:8000", True),
    ],
)
async def test_a_name_is_right_or_every_address_is_refused(
    start: StartServer, settings: dict[str, Any], host: str, is_right: bool
) -> None:
    server = await start(**settings)
    headers = {"Host": host, "Authorization": "Bearer key"}
    for path in ("/", "/health", "/metrics", "/v1/models", "/v1/streams"):
        async with server.get(path, headers=headers) as response:
            assert response.status == (200 if is_right else 421), path
            if not is_right:
                error = (await response.json())["error"]
                assert error["code"] == "host_not_allowed"
                assert "server.allowed_hosts" in error["message"]
    async with server.post("/v1/completions", {"prompt": "x"}, headers=headers) as response:
        assert response.status == (200 if is_right else 421)


@pytest.mark.parametrize("name", ["", "https://a.example", "a.example:80", "*.a.example", "a b"])
def test_what_is_no_name_is_refused_at_the_start(name: str) -> None:
    with pytest.raises(ConfigError, match=r"server\.allowed_hosts"):
        config_from({"model": "m", "server": {"allowed_hosts": [name]}})

"""Packed bodies: what clients pack is read, and what cannot be read is an error in the API's own words."""

from __future__ import annotations

import gzip
import json
import zlib

import pytest

from tests.http.conftest import Running, StartServer

PLAIN = "/v1/completions"
BODY = json.dumps({"prompt": "Hi 你好", "max_tokens": 3}).encode()
GZIP = gzip.compress(BODY)


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


async def send(server: Running, path: str, data: bytes, encoding: str) -> tuple[int, dict[str, object], str | None]:
    """Status, body and Accept-Encoding of an answer."""
    headers = {"Content-Encoding": encoding}
    async with server.session.post(server.url + path, data=data, headers=headers) as response:
        assert response.content_type == "application/json"
        return response.status, await response.json(), response.headers.get("Accept-Encoding")


@pytest.mark.parametrize(
    ("encoding", "data"),
    [
        ("gzip", GZIP),
        ("GZip", GZIP),
        ("x-gzip", GZIP),
        ("identity, gzip", GZIP),
        ("deflate", zlib.compress(BODY)),
        ("deflate", raw_deflate(BODY)),
        ("identity", BODY),
        ("", BODY),
    ],
)
async def test_packed_bodies_are_read(start: StartServer, encoding: str, data: bytes) -> None:
    server = await start()
    assert (await send(server, PLAIN, data, encoding))[0] == 200
    assert bytes(server.engine.live[0].prompt[1:]).decode() == "Hi 你好"


@pytest.mark.parametrize("path", ["/v1/chat/completions", PLAIN, "/tokenize", "/detokenize", "/abort_request"])
@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "wobble", "gzip, gzip", "gzip, br"])
async def test_an_unknown_packing_is_a_415_that_says_what_is_known(
    start: StartServer, path: str, encoding: str
) -> None:
    server = await start()
    status, body, known = await send(server, path, GZIP, encoding)
    assert (status, known) == (415, "gzip, deflate")
    assert body["error"]["code"] == "unsupported_encoding"  # type: ignore[index]


@pytest.mark.parametrize(
    ("encoding", "data"),
    [
        ("gzip", BODY),
        ("gzip", b""),
        ("gzip", GZIP[:-9]),
        ("gzip", GZIP[:-8] + b"\0" * 8),
        ("gzip", GZIP + b"more"),
        ("gzip", zlib.compress(BODY)),
        ("deflate", GZIP),
        ("deflate", zlib.compress(BODY)[:-5]),
    ],
)
async def test_a_broken_packing_is_a_400(start: StartServer, encoding: str, data: bytes) -> None:
    server = await start()
    status, body, _ = await send(server, PLAIN, data, encoding)
    assert (status, body["error"]["code"]) == (400, "invalid_body")  # type: ignore[index]
    assert not server.engine.live


@pytest.mark.parametrize(("size", "status"), [(1000, 200), (1001, 413), (50_000_000, 413)])
async def test_the_limit_is_that_of_what_is_unpacked(start: StartServer, size: int, status: int) -> None:
    server = await start(max_body_bytes=1000)
    data = BODY + b" " * (size - len(BODY))
    for encoding, packed in (("gzip", gzip.compress(data)), ("deflate", raw_deflate(data))):
        assert (await send(server, PLAIN, packed, encoding))[0] == status

"""API keys over HTTP: which streams a key may see, what it may ask for, and that no key is ever shown."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.http.conftest import Running, StartServer
from tests.http.test_live_streams import PLAIN
from tests.http.test_observability import scrape
from tfserve.config import config_from
from tfserve.errors import ConfigError, TfserveError
from tfserve.http.keys import ENVIRONMENT, Keyring, peer
from tfserve.http.routes import ROUTES
from tfserve.settings import ApiKey
from tfserve.types import FinishReason

KEYS: list[dict[str, Any]] = [
    {"name": "alice", "key": "sk-alice", "weight": 2},
    {"name": "bob", "key": "sk-bob"},
    {"name": "root", "key": "sk-root", "admin": True},
]


def by(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer sk-{name}"}


async def open_for(server: Running, name: str) -> tuple[Any, str]:
    """A stream of this key that has begun: the response and the answer's id."""
    asking = asyncio.ensure_future(server.post(PLAIN, {"prompt": "x", "stream": True}, headers=by(name)).__aenter__())
    await server.engine.submitted.wait()
    server.engine.submitted.clear()
    server.engine.live[-1].say("hello")
    response = await asking
    first = json.loads((await response.content.readuntil(b"\n\n")).removeprefix(b"data: "))
    return response, first["id"]


async def listed(server: Running, name: str, **more: str) -> list[str]:
    async with server.get("/v1/streams", headers={**by(name), **more}) as response:
        if more:
            body = json.loads((await response.content.readuntil(b"\n\n")).removeprefix(b"data: "))
        else:
            body = await response.json()
    assert set(body["stats"]) == {*body["stats"]} - {"streams"}
    return [row["id"] for row in body["data"]]


@pytest.mark.parametrize("more", [{}, {"Accept": "text/event-stream"}])
async def test_a_key_lists_its_own_streams_and_an_admin_all(start: StartServer, more: dict[str, str]) -> None:
    server = await start(reply=None, api_keys=KEYS)
    (of_alice, alice), (of_bob, bob) = await open_for(server, "alice"), await open_for(server, "bob")
    assert await listed(server, "alice", **more) == [f"{alice}-0"]
    assert await listed(server, "bob", **more) == [f"{bob}-0"]
    assert await listed(server, "root", **more) == [f"{alice}-0", f"{bob}-0"]
    of_alice.close()
    of_bob.close()


@pytest.mark.parametrize("suffix", ["", "-0"])
async def test_the_stream_of_another_key_is_not_there(start: StartServer, suffix: str) -> None:
    server = await start(reply=None, api_keys=KEYS)
    opened, answer = await open_for(server, "alice")
    stream, said = server.engine.live[-1], {}
    for name in (answer + suffix, "cmpl-unknown"):
        for path, body in (
            (f"/v1/streams/{name}/buffer", {"played_tokens": 1}),
            ("/abort_request", {"request_id": name}),
        ):
            async with server.post(path, body, headers=by("bob")) as response:
                assert response.status == 404
                text = (await response.text()).replace(name, "ID")
                # It cannot be told from one that does not exist.
                assert said.setdefault(path.replace(name, "ID"), text) == text
    assert (stream.played, stream.aborted.is_set()) == ([], False)
    for name in ("alice", "root"):
        async with server.post(
            f"/v1/streams/{answer}{suffix}/buffer", {"played_tokens": 1}, headers=by(name)
        ) as response:
            assert response.status == 200
    async with server.post("/abort_request", {"request_id": answer + suffix}, headers=by("root")) as response:
        assert response.status == 200
    assert stream.aborted.is_set()
    opened.close()


async def test_without_keys_all_see_all(start: StartServer) -> None:
    server = await start(reply=None)
    opened, answer = await open_for(server, "alice")
    assert await listed(server, "bob") == [f"{answer}-0"]
    async with server.post("/abort_request", {"request_id": answer}) as response:
        assert response.status == 200
    opened.close()


async def test_the_engine_is_told_the_tenant(start: StartServer) -> None:
    server = await start(api_keys=[*KEYS, "plain"])
    for name in ("alice", "bob"):
        async with server.post(PLAIN, {"prompt": "x"}, headers=by(name)) as response:
            assert response.status == 200
    async with server.post(PLAIN, {"prompt": "x"}, headers={"Authorization": "Bearer plain"}) as response:
        assert response.status == 200
    told = [(stream.tenant.name, stream.tenant.weight) for stream in server.engine.live]
    assert told == [("alice", 2.0), ("bob", 1.0), ("key-4", 1.0)]


@pytest.mark.parametrize(
    ("addresses", "number"),
    [
        (["127.0.0.1", "127.0.0.9", "::1", "::ffff:127.0.0.1", None, "/run/socket"], 1),
        (["10.0.0.1", "::ffff:10.0.0.1"], 1),
        (["10.0.0.1", "10.0.0.2"], 2),
        (["2001:db8::1", "2001:db8::ffff:2", "fe80::1%eth0"], 2),
        (["2001:db8:0:1::1", "2001:db8:0:2::1"], 2),
    ],
)
def test_without_keys_an_address_is_a_tenant_that_sees_all(addresses: list[str | None], number: int) -> None:
    callers = [peer(address) for address in addresses]
    assert len({caller.tenant for caller in callers}) == number
    assert all(a.may_see(b.tenant) for a in callers for b in callers)


async def test_requests_per_minute(start: StartServer) -> None:
    server = await start(api_keys=[{"name": "alice", "key": "sk-alice", "requests_per_minute": 2}, KEYS[1]])
    for path, body, left in ((PLAIN, {"prompt": "x"}, "1"), ("/tokenize", {"prompt": "x"}, "0")):
        async with server.post(path, body, headers=by("alice")) as response:
            assert response.status == 200
            assert response.headers["x-ratelimit-limit-requests"] == "2"
            assert response.headers["x-ratelimit-remaining-requests"] == left
            assert "x-ratelimit-limit-tokens" not in response.headers
    async with server.post(PLAIN, {"prompt": "x"}, headers=by("alice")) as response:
        assert response.status == 429
        assert 1 <= int(response.headers["Retry-After"]) <= 30
        assert (await response.json())["error"]["code"] == "rate_limit_exceeded"
    async with server.get("/v1/streams", headers=by("alice")) as response:
        assert response.status == 200
    async with server.post(PLAIN, {"prompt": "x"}, headers=by("bob")) as response:
        assert response.status == 200
        assert not any(name.lower().startswith("x-ratelimit") for name in response.headers)


@pytest.mark.parametrize(
    "path", [route.path for route in ROUTES if route.body is not None and "model" in route.body.__struct_fields__]
)
async def test_every_request_for_the_model_counts_even_a_bad_one(start: StartServer, path: str) -> None:
    server = await start(api_keys=[KEYS[0] | {"requests_per_minute": 1}])
    for status in (400, 429):
        async with server.post(path, {}, headers=by("alice")) as response:
            assert response.status == status


async def test_tokens_per_minute(start: StartServer) -> None:
    limited = {"name": "alice", "key": "sk-alice", "tokens_per_minute": 20}
    server = await start(reply="Hello, wide world", api_keys=[limited])
    async with server.post(PLAIN, {"prompt": "x" * 20}, headers=by("alice")) as response:
        assert response.status == 429  # more than a minute ever has
        assert response.headers["X-Should-Retry"] == "false"
    async with server.post(PLAIN, {"prompt": "four"}, headers=by("alice")) as response:
        assert response.status == 200
        assert response.headers["x-ratelimit-remaining-tokens"] == "0"  # 5 + 17
    async with server.post(PLAIN, {"prompt": "four"}, headers=by("alice")) as response:
        assert response.status == 429
        assert int(response.headers["Retry-After"]) > 5
    assert server.service.num_open == 0


async def test_streams_at_once_are_choices_and_come_back(start: StartServer) -> None:
    limited = {"name": "alice", "key": "sk-alice", "max_streams": 3}
    server = await start(reply=None, api_keys=[limited, KEYS[1]])
    async with server.post(PLAIN, {"prompt": "x", "n": 4}, headers=by("alice")) as response:
        assert (response.status, (await response.json())["error"]["param"]) == (400, "n")
    first = asyncio.ensure_future(server.post(PLAIN, {"prompt": "x", "n": 2}, headers=by("alice")).__aenter__())
    await server.engine.submitted.wait()
    async with server.post(PLAIN, {"prompt": "x", "n": 2}, headers=by("alice")) as response:
        assert (response.status, response.headers["Retry-After"]) == (429, "1")
    for stream in server.engine.live:
        stream.say("done", FinishReason.STOP)
    assert (await first).status == 200
    asking = asyncio.ensure_future(server.post(PLAIN, {"prompt": "x", "n": 3}, headers=by("alice")).__aenter__())
    await asyncio.sleep(0.1)
    asking.cancel()
    await asyncio.wait_for(server.service.idle.wait(), 2)
    (caller,) = [server.service.keys.find("Bearer sk-alice")]
    assert caller is not None
    assert caller.limits.num_streams == 0


async def test_keys_are_counted_by_name_and_never_shown(start: StartServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    keys = [{**KEYS[0], "requests_per_minute": 1}, KEYS[1]]
    server = await start(reply="Hello", api_keys=keys)
    for name, status in (("alice", 200), ("alice", 429), ("bob", 200), ("mallory", 401), ("eve", 401)):
        async with server.post(PLAIN, {"prompt": "four"}, headers=by(name)) as response:
            assert response.status == status
            assert "sk-" not in await response.text()
    seen = await scrape(server)
    assert (seen["key_requests_total", "alice"], seen["key_requests_total", "bob"]) == (1, 1)
    assert (seen["key_prompt_tokens_total", "bob"], seen["key_generation_tokens_total", "bob"]) == (5, 5)
    async with server.get("/metrics") as response:
        text = await response.text()
    assert 'key_requests_refused_total{key="alice",reason="rate_limit_exceeded"} 1.0' in text
    assert 'key_requests_refused_total{key="other",reason="unauthorized"} 2.0' in text
    assert "sk-" not in text + caplog.text
    assert "mallory" not in text
    assert "key alice" in caplog.text


def ring(environ: dict[str, str] | None = None, **server: Any) -> Keyring:
    return Keyring(config_from({"model": "m", "server": server}), environ or {})


def test_keys_come_from_settings_file_and_environment_together(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("- from-file\n- {name: carol, key: sk-carol, weight: 3, admin: on}\n".replace("on}", "true}"))
    file.chmod(0o600)
    environ = {ENVIRONMENT: "[from-environment, {name: dave, key: sk-dave}]"}
    keys = ring(environ, api_keys=["plain", KEYS[0]], api_keys_file=str(file))
    names = [keys.find(f"Bearer {key}") for key in ("plain", "sk-alice", "from-file", "sk-carol", "from-environment")]
    assert [caller.key_name if caller else None for caller in names] == ["key-1", "alice", "key-3", "carol", "key-5"]
    carol = keys.find("bearer sk-carol")
    assert carol is not None
    assert (carol.tenant.weight, carol.sees_all) == (3.0, True)
    assert len(ring({ENVIRONMENT: "one,two"})) == 2
    assert len(ring({ENVIRONMENT: ""})) == 0
    for wrong in ("", "Bearer", "Bearer ", "Basic plain", "plain", "Bearer key-1", "Bearer \udcff"):
        assert keys.find(wrong) is None


def test_a_file_that_others_may_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("[secret]")
    file.chmod(0o644)
    assert len(ring(api_keys_file=str(file))) == 1
    assert str(file) in caplog.text
    assert "secret" not in caplog.text


BAD = [
    ([{"name": "a b", "key": "sk-secret"}], "name"),
    ([{"name": "a", "key": "sk secret"}], "server.api_keys"),
    ([{"name": "a", "key": ""}], "server.api_keys"),
    ([{"name": "a"}], "[0].key"),
    ([{"key": "sk-secret"}], "[0].name"),
    ([{"name": "a", "key": "sk-secret", "weight": 0}], "weight"),
    ([{"name": "a", "key": "sk-secret", "weight": "sk-secret"}], "weight"),
    ([{"name": "a", "key": "sk-secret", "weight": float("nan")}], "weight"),
    ([{"name": "a", "key": "sk-secret", "max_streams": 0}], "max_streams"),
    ([{"name": "a", "key": "sk-secret", "requests_per_minute": -1}], "requests_per_minute"),
    ([{"name": "a", "key": "sk-secret", "tokens_per_minute": 2**70}], "tokens_per_minute"),
    ([{"sk-secret": "a"}], "[0]"),
    ([{"name": "a", "key": "k", "sk-secret": 1}], "[0]"),
    ([{"name": "a", "key": "sk-secret"}, {"name": "a", "key": "other"}], "same name"),
    ([{"name": "a", "key": "sk-secret"}, {"name": "b", "key": "sk-secret"}], "same key"),
    (["sk-secret", "sk-secret"], "same key"),
    (["first", {"name": "key-1", "key": "sk-secret"}], "same name"),
    ([["sk-secret"]], "[0]"),
]


@pytest.mark.parametrize(("given", "names"), BAD)
@pytest.mark.parametrize("where", ["settings", "file", "environment"])
def test_mistakes_are_named_and_keys_are_not(given: Any, names: str, where: str, tmp_path: Path) -> None:
    text = json.dumps(given).replace("NaN", ".nan")
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    file.chmod(0o600)
    sources: dict[str, Any] = {
        "settings": {"api_keys": given},
        "file": {"api_keys_file": str(file)},
        "environment": {"environ": {ENVIRONMENT: text}},
    }
    with pytest.raises(TfserveError) as caught:
        ring(**sources[where])
    assert isinstance(caught.value, ConfigError)
    assert names in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["*sk-secret", "sk-secret", "{a: sk-secret", "- a\n- &x sk-secret\n *y", "\x00", "- !!int sk-secret"]
)
def test_a_file_that_is_no_list_is_not_quoted(text: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(ConfigError) as caught:
        ring(api_keys_file=str(file))
    assert "keys.yaml" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing", Path("/dev/zero")):
        with pytest.raises(ConfigError, match=r"^server\.api_keys_file"):
            ring(api_keys_file=str(path))


def test_an_entry_does_not_show_its_key() -> None:
    assert "sk-bob" not in repr(ApiKey(name="bob", key="sk-bob"))

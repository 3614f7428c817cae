"""The OpenAPI document speaks of every address, and schemathesis finds no answer that it does not foresee."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest
from aiohttp import web

from tests.http.conftest import StartServer
from tests.http.fakes import FakeEngine
from tfserve.config import EngineConfig, config_from
from tfserve.http.app import create_app
from tfserve.http.connections import create_runner
from tfserve.http.openapi import document
from tfserve.http.service import Service

NUM_EXAMPLES = 50


class ThreadedServer:
    """A server with a FakeEngine in a thread of its own."""

    def __init__(self) -> None:
        config: EngineConfig = config_from({"model": "models/tiny"})
        self.service = Service(config)
        self.loop = asyncio.new_event_loop()
        self.url = self.loop.run_until_complete(self._start(config))
        self.thread = Thread(target=self.loop.run_forever)
        self.thread.start()

    async def _start(self, config: EngineConfig) -> str:
        self.engine = FakeEngine(config, reply="Hi there")
        self.service.ready(self.engine)
        self.runner = create_runner(create_app(self.service), shutdown_timeout_s=1.0)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self.runner.addresses[0][1]}"

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def server() -> Iterator[ThreadedServer]:
    server = ThreadedServer()
    yield server
    server.stop()


async def test_the_document_names_every_address_and_nothing_else(start: StartServer) -> None:
    server = await start(api_keys=["key"])
    async with server.get("/openapi.json", headers={"Authorization": "Bearer key"}) as response:
        served = await response.json()
    assert served == document("tiny", with_keys=True)
    routes = {
        (route.method.lower(), route.resource.canonical)
        for route in create_app(server.service).router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    told = {(method, path) for path, item in served["paths"].items() for method in item}
    assert told == routes - {("get", "/openapi.json")}


def unresolved(node: Any, components: dict[str, Any]) -> Iterator[str]:
    if isinstance(node, dict):
        ref = node.get("$ref")
        if isinstance(ref, str) and ref.rpartition("/")[2] not in components:
            yield ref
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from unresolved(child, components)


def test_every_reference_resolves() -> None:
    told = document("tiny", with_keys=False)
    assert list(unresolved(told, told["components"]["schemas"])) == []


def bounds(schema: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Numbers just beyond what a body's schema allows, with their fields."""
    for name, field in schema["properties"].items():
        for variant in field.get("anyOf", [field]):
            if "minimum" in variant:
                yield name, variant["minimum"] - 1
                yield name, variant["maximum"] + 1 if "maximum" in variant else 2**63


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True}),
        ("/v1/completions", {"prompt": "Hi"}),
    ],
)
async def test_a_number_beyond_the_documented_bounds_is_refused_by_its_name(
    path: str, body: dict[str, Any], start: StartServer
) -> None:
    server = await start()
    told = document("tiny", with_keys=False)
    ref = told["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    beyond = list(bounds(told["components"]["schemas"][ref.rpartition("/")[2]]))
    assert len(beyond) > 20
    for name, value in beyond:
        async with server.post(path, {**body, name: value}) as response:
            assert (response.status, (await response.json())["error"]["param"]) == (400, name), value


@pytest.mark.slow
def test_schemathesis_finds_no_answer_that_the_document_does_not_foresee(server: ThreadedServer) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == len([method for item in schema.raw_schema["paths"].values() for method in item])
    plain = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
        "/v1/completions": {"prompt": "Hi"},
    }
    for path, body in plain.items():
        # Of random bodies few or none are accepted: too many fields exclude each other.
        case = schema[path]["POST"].Case(body=body, media_type="application/json")
        assert case.call_and_validate().status_code == 200
    for operation in operations:
        # What has no body cannot be sent wrong.
        modes = list(schemathesis.GenerationMode) if operation.body else [schemathesis.GenerationMode.POSITIVE]
        for mode in modes:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=NUM_EXAMPLES,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.explicit, Phase.generate],
            )
            def check(case: Any) -> None:
                # Which fields go together (echo and max_tokens=0, tools and tool_choice) is beyond JSON schema, so
                # bodies that are right by the schema may be refused.
                case.call_and_validate(excluded_checks=[positive_data_acceptance])

            check()
    assert server.service.num_open == 0
    assert all(stream._ended for stream in server.engine.live)

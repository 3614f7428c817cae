"""What the server tells its operator: metrics, the interval line, and nothing of any prompt."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.http.conftest import Running, StartServer
from tfserve.http.interval_log import interval_line, log_intervals
from tfserve.messages import StepOutputs
from tfserve.types import FinishReason

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana-dashboard.json"


async def scrape(server: Running) -> dict[tuple[str, str], float]:
    """Samples by name (without our prefix) and label values."""
    async with server.get("/metrics") as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        text = await response.text()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(s.name.removeprefix("tfserve:"), ",".join(s.labels.values())): s.value for s in samples}


async def test_a_request_is_counted_once_with_its_times(start: StartServer) -> None:
    server = await start(reply=None)
    body = {"prompt": "abc", "consumption_rate": 20}
    asking = asyncio.ensure_future(server.post("/v1/completions", body).__aenter__())
    await server.engine.submitted.wait()
    server.engine.live[0].say("12345")
    server.engine.live[0].say("678", FinishReason.LENGTH)
    (await asking).close()
    seen = await scrape(server)
    assert seen["request_success_total", "length"] == 1
    assert seen["request_generation_tokens_sum", ""] == 8
    assert seen["request_prompt_tokens_sum", ""] == 4
    assert seen["time_to_first_token_seconds_count", ""] == 1
    assert seen["inter_token_latency_seconds_count", ""] == 7
    assert seen["inter_token_latency_seconds_bucket", "+Inf"] == 7
    assert seen["stream_stall_seconds_sum", ""] == 0.5
    assert 0 < seen["effective_tokens_total", ""] <= 8


async def test_first_tokens_and_gaps_are_those_of_the_answer_behind_the_thoughts(start: StartServer) -> None:
    server = await start(reply="<think>a b c</think>yes")
    server.engine.tokenizer.thinks = True
    body = {"messages": [{"role": "user", "content": "x"}], "consumption_rate": 20}
    async with server.post("/v1/chat/completions", body) as response:
        assert (await response.json())["usage"]["completion_tokens_details"] == {"reasoning_tokens": 20}
    seen = await scrape(server)
    assert seen["request_generation_tokens_sum", ""] == 23
    assert seen["time_to_first_token_seconds_count", ""] == 1
    assert seen["inter_token_latency_seconds_count", ""] == 2
    server.engine.reply = "<think>a b c"
    async with server.post("/v1/chat/completions", body) as response:
        await response.read()
    seen = await scrape(server)
    assert seen["time_to_first_token_seconds_count", ""] == 1
    assert seen["e2e_request_latency_seconds_count", ""] == 2


async def test_what_names_no_rate_is_not_scored_for_a_reader(start: StartServer) -> None:
    server = await start()
    for body in ({"prompt": "abc"}, {"prompt": "abc", "stream": True}):
        async with server.post("/v1/completions", body) as response:
            await response.read()
    seen = await scrape(server)
    assert seen["request_success_total", "stop"] == 2
    assert seen["stream_stall_seconds_count", ""] == 0
    assert seen["effective_tokens_total", ""] == 0


async def test_the_engines_state_is_shown_as_it_is(start: StartServer) -> None:
    server = await start(reply=None)
    asking = asyncio.ensure_future(server.post("/v1/completions", {"prompt": "abc"}).__aenter__())
    await server.engine.submitted.wait()
    for callback in server.engine.step_callbacks:
        callback(StepOutputs([], server.engine.stats(), resumed=[("load", 0.02), ("recompute", 2.0)]))
    seen = await scrape(server)
    assert seen["kv_cache_usage_perc", ""] == pytest.approx(0.24)
    assert seen["num_requests_running", ""] == 1
    assert seen["generation_tokens_total", ""] == 50
    assert (seen["preemptions_total", "offload"], seen["preemptions_total", "recompute"]) == (2, 1)
    assert (seen["resume_seconds_count", "load"], seen["resume_seconds_sum", "recompute"]) == (1, 2.0)
    assert seen["stream_buffer_seconds", "0.5"] == 0.25
    asking.cancel()


async def test_requests_whose_clients_left_count_as_aborted(start: StartServer) -> None:
    server = await start(reply=None)
    asking = asyncio.ensure_future(server.post("/v1/completions", {"prompt": ["abc", "d"]}).__aenter__())
    await server.engine.submitted.wait()
    asking.cancel()
    await asyncio.wait_for(server.service.idle.wait(), 2)
    assert (await scrape(server))["request_success_total", "abort"] == 2


async def test_refusals_are_counted_by_reason(start: StartServer) -> None:
    server = await start(reply=None)
    server.engine.queue_full = True
    async with server.post("/v1/completions", {"prompt": "abc"}) as response:
        assert response.status == 429
    assert (await scrape(server))["requests_refused_total", "queue_full"] == 1


async def test_metrics_are_there_while_loading_and_without_a_key(start: StartServer) -> None:
    server = await start(loaded=False, api_keys=["secret"])
    assert ("request_generation_tokens_count", "") in await scrape(server)


async def test_nothing_that_people_wrote_is_logged(start: StartServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server = await start(reply="the answer", api_keys=["a-secret-key"])
    headers = {"Authorization": "Bearer a-secret-key"}
    body = {"messages": [{"role": "user", "content": "my question"}], "stream": True, "oddity": "private"}
    async with server.post("/v1/chat/completions?token=hidden", body, headers=headers) as response:
        assert response.status == 200
        await response.read()
    for word in ("question", "answer", "a-secret-key", "private", "hidden"):
        assert word not in caplog.text


def test_the_interval_line_tells_what_happened_since_the_last(caplog: pytest.LogCaptureFixture) -> None:
    from tests.http.fakes import FakeEngine
    from tfserve.config import EngineConfig

    before = FakeEngine(EngineConfig(model="m")).stats()
    now = msgspec.structs.replace(
        before, step=27, num_output_tokens=150, num_preemptions=5, num_host_blocks=11, num_free_host_blocks=4
    )
    fields = dict(pair.split("=") for pair in interval_line(before, now, 10.0).removeprefix("interval ").split(" "))
    assert fields["output_tokens_per_s"] == "10.0"
    assert (fields["kv"], fields["host_kv"], fields["preemptions"], fields["steps"]) == ("0.24", "0.60", "2", "20")


async def test_intervals_without_work_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    from tests.http.fakes import FakeEngine
    from tfserve.config import EngineConfig

    caplog.set_level(logging.INFO)
    logging_them = asyncio.ensure_future(log_intervals(FakeEngine(EngineConfig(model="m")), 0.01))
    await asyncio.sleep(0.05)
    logging_them.cancel()
    assert "interval" not in caplog.text


async def test_the_dashboard_asks_for_metrics_that_exist(start: StartServer) -> None:
    server = await start()
    async with server.post("/v1/completions", {"prompt": "abc"}) as response:
        assert response.status == 200
    async with server.get("/metrics") as response:
        text = await response.text()
    known = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    known |= {family.name for family in text_string_to_metric_families(text)}
    # Labelled ones show up with their first event.
    known |= {"tfserve:requests_refused_total", "tfserve:resume_seconds_bucket"}
    queries = [target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]]
    asked = {word for query in queries for word in query.replace("(", " ").replace("[", " ").replace("{", " ").split()}
    asked = {word.rstrip(")") for word in asked if word.startswith("tfserve:")}
    assert len(asked) > 10
    assert asked <= known


@pytest.mark.parametrize("origins", [[], ["https://a.example"], ["*"]])
async def test_pages_of_other_sites_are_let_in_only_if_named(start: StartServer, origins: list[str]) -> None:
    server = await start(cors_origins=origins)
    for origin in ("https://a.example", "https://b.example"):
        is_allowed = origin in origins or "*" in origins
        wish = "authorization, content-type, x-stainless-lang"
        asked = {
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": wish,
        }
        async with server.session.options(server.url + "/v1/completions", headers=asked) as response:
            assert response.status == (204 if is_allowed else 405)
            assert response.headers.get("Access-Control-Allow-Origin") == (origin if is_allowed else None)
            assert response.headers.get("Access-Control-Allow-Headers") == (wish if is_allowed else None)
        body = {"prompt": "x", "stream": True}
        headers = {"Origin": origin, "Content-Type": "application/json"}
        async with server.post("/v1/completions", body, headers=headers) as response:
            assert response.headers.get("Access-Control-Allow-Origin") == (origin if is_allowed else None)


async def test_what_comes_every_few_seconds_is_logged_at_debug_level(
    start: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server = await start(reply=None)
    async with server.get("/health"), server.post("/v1/streams/cmpl-1/buffer", {"played_tokens": 1}):
        pass
    async with server.get("/v1/models"), server.get("/no/such/path"):
        pass
    levels = {
        path: {record.levelno for record in caplog.records if f" {path} " in record.getMessage()}
        for path in ("/health", "/v1/streams/cmpl-1/buffer", "/v1/models", "/no/such/path")
    }
    assert list(levels.values()) == [{logging.DEBUG}, {logging.DEBUG}, {logging.INFO}, {logging.INFO}]

from __future__ import annotations

import socket

import pytest

from tests.bench.fake_server import DONE, ROLE, FakeServer, event, finish, serving, text, usage
from tfserve.bench.client import RequestRecord, StreamClient, Target, first_model, open_session
from tfserve.bench.sse_parser import SseParser
from tfserve.bench.workload import Work
from tfserve.errors import TfserveError


async def ask(server: FakeServer, timeout_s: float = 5.0, rate=None, **settings) -> RequestRecord:
    async with serving(server), open_session("key", timeout_s) as session:
        record = RequestRecord(index=0, arrival_s=0.0)
        target = Target(base_url=server.url, model="m", **settings)
        await StreamClient(session, target).send(record, Work("hello", 8, rate))
        return record


def split_every(data: bytes, size: int) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_events_come_out_whole_wherever_the_network_cut_them(size, newline):
    stream = newline.join(
        [b": hello", b"data: one", b"", b"event: x", b"data:two", b"data: three", b"", b"id: 7", b"", b""]
    )
    parser = SseParser()
    events = [payload for part in split_every(stream, size) for payload in parser.feed(part)]
    assert events == [b"one", b"two\nthree"]
    assert list(parser.close()) == []


def test_last_event_without_a_blank_line_is_not_lost():
    parser = SseParser()
    assert list(parser.feed(b"data: end")) == []
    assert list(parser.close()) == [b"end"]


def took(delay: float) -> object:
    """A time that is at least the server's delay, and not much longer even on a busy machine."""
    return pytest.approx(delay + 0.1, abs=0.105)


async def test_times_follow_the_servers_delays():
    record = await ask(
        FakeServer([ROLE, 0.25, text("a"), 0.05, text("b"), 0.45, text("c"), finish(), usage(5, 3), DONE])
    )
    assert record.error is None
    assert record.ttft_s == took(0.25)
    assert record.gaps_s == [took(0.05), took(0.45)]
    assert record.tpot_s == took(0.25)
    assert [n for _, n in record.chunks] == [1, 1, 1]
    assert (record.prompt_tokens, record.output_tokens, record.finish_reason) == (5, 3, "length")
    assert record.end_s >= record.chunks[-1][0]


async def test_packets_split_inside_an_event_and_inside_a_character_change_nothing():
    stream = ROLE + b": keep-alive\n\n" + text("né") + text("日本") + finish("stop") + usage(2, 2) + DONE
    parts = [piece for part in split_every(stream, 7) for piece in (part, 0.001)]
    record = await ask(FakeServer(parts))
    assert (record.error, record.placed_tokens, record.finish_reason) == (None, 2, "stop")


async def test_tokens_beyond_the_chunks_are_counted_but_not_given_a_time():
    record = await ask(FakeServer([text("ab"), text("cd"), finish(), usage(1, 10), DONE]))
    assert (record.num_tokens, record.placed_tokens) == (10, 2)


async def test_running_usage_tells_how_many_tokens_a_chunk_holds():
    running = [
        text(t, usage={"prompt_tokens": 1, "completion_tokens": n}) for t, n in [("abc", 3), ("d", 4), ("ef", 6)]
    ]
    record = await ask(FakeServer([*running, finish(), usage(1, 6), DONE]))
    assert [n for _, n in record.chunks] == [3, 1, 2]


async def test_without_usage_chunks_are_counted():
    record = await ask(FakeServer([text("a"), text("b"), finish(), DONE]))
    assert (record.error, record.output_tokens, record.num_tokens) == (None, None, 2)


async def test_completions_endpoint_is_asked_and_read_in_its_own_words():
    server = FakeServer([event({"choices": [{"text": "a", "finish_reason": "stop"}], "usage": None}), DONE])
    record = await ask(server, endpoint="completions", ignore_eos=True)
    assert (record.error, record.placed_tokens) == (None, 1)
    (body,) = server.bodies
    assert (body["prompt"], body["max_tokens"], body["ignore_eos"], body["stream"]) == ("hello", 8, True, True)
    assert server.headers[0]["Authorization"] == "Bearer key"


async def test_ignore_eos_is_not_sent_unless_asked_for():
    server = FakeServer([finish(), DONE])
    await ask(server)
    assert {"ignore_eos", "consumption_rate"}.isdisjoint(server.bodies[0])


@pytest.mark.parametrize("rate", [7.5, "read"])
async def test_the_readers_rate_is_sent_as_it_was_given(rate):
    server = FakeServer([finish(), DONE])
    await ask(server, rate=rate)
    assert server.bodies[0]["consumption_rate"] == rate


async def test_preemptions_are_taken_from_usage_where_the_server_counts_them():
    last = event({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1, "num_preemptions": 4}})
    assert (await ask(FakeServer([text("a"), finish(), last, DONE]))).num_preemptions == 4
    assert (await ask(FakeServer([text("a"), finish(), usage(1, 1), DONE]))).num_preemptions is None


@pytest.mark.parametrize(
    ("script", "kind", "detail"),
    [
        ([text("a"), event({"error": {"message": "engine died", "code": 500}}), DONE], "stream_error", "engine died"),
        ([text("a"), event({"error": "plain words"})], "stream_error", "plain words"),
        ([text("a"), event({"object": "error", "message": "old style"})], "stream_error", "old style"),
        ([text("a"), event("{oops"), DONE], "malformed", "oops"),
        ([text("a"), event('{"choices": [null]}'), DONE], "malformed", "a choice must be a JSON object"),
        ([text("a"), event('{"choices": true}'), DONE], "malformed", "choices must be a list"),
        ([text("a"), event('{"choices": ' + "[" * 100_000), DONE], "malformed", "nested too deeply"),
        ([text("a"), b'data: "\xff"\n\n', DONE], "malformed", "not valid UTF-8"),
        ([text("a"), usage(5, -3), DONE], "malformed", "counts -3"),
        ([text("a"), usage(5, 10**12), DONE], "malformed", "counts 1000000000000"),
        ([text("a"), 0.01], "truncated", "finish_reason"),
        ([text("a"), 0.01, None], "disconnected", ""),
        ([text("a"), 1.0], "timeout", "time allowed"),
    ],
)
async def test_a_stream_that_breaks_is_a_failure_of_its_kind(script, kind, detail):
    record = await ask(FakeServer(script), timeout_s=0.3)
    assert record.error == kind
    assert detail in record.error_detail
    assert record.placed_tokens == 1


async def test_an_answer_that_is_no_stream_is_a_failure_with_its_status():
    record = await ask(FakeServer([], status=429))
    assert record.error == "http_429"
    assert "no seat free" in record.error_detail


def closed_port_url() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{sock.getsockname()[1]}"


async def test_refused_connection_is_a_failure_of_the_request():
    async with open_session(None, 2.0) as session:
        record = RequestRecord(index=0, arrival_s=0.0)
        await StreamClient(session, Target(base_url=closed_port_url(), model="m")).send(record, Work("hi", 1))
    assert record.error == "connect"


@pytest.mark.parametrize(("host", "key"), [("x" * 70 + ".test", "key"), (None, "two\nlines")])
async def test_what_cannot_be_sent_at_all_is_an_error_and_not_a_traceback(host, key):
    async with serving(FakeServer([])) as server, open_session(key, 2.0) as session:
        url = server.url if host is None else server.url.replace("127.0.0.1", host)
        with pytest.raises(TfserveError, match="correct --base-url, or --api-key"):
            await first_model(session, url)
        record = RequestRecord(index=0, arrival_s=0.0)
        await StreamClient(session, Target(base_url=url, model="m")).send(record, Work("hi", 1))
    assert record.error == "invalid"


async def test_asking_an_absent_server_for_its_model_says_what_to_do():
    async with open_session(None, 2.0) as session:
        with pytest.raises(TfserveError, match="connection refused; start the server"):
            await first_model(session, closed_port_url())


async def test_the_first_listed_model_is_found_with_or_without_v1():
    async with serving(FakeServer([])) as server, open_session(None, 2.0) as session:
        assert await first_model(session, server.url) == "fake-model"
        assert await first_model(session, server.url + "/v1/") == "fake-model"

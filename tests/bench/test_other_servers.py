"""The benchmark client against other servers: each can be measured, or the error says why not."""

from __future__ import annotations

import asyncio
import json

import msgspec
import pytest

from tests.bench.fake_server import DONE, ROLE, event, finish, text, usage
from tests.bench.other_servers import RawServer, chunked, head, serving_raw
from tests.bench.test_cli import run
from tfserve.bench.client import RequestRecord, StreamClient, Target, first_model, open_session
from tfserve.bench.workload import Work
from tfserve.errors import TfserveError

PARTS = (ROLE, text("né"), text("b"), finish("stop"), usage(5, 2), DONE)
STREAM = b"".join(PARTS)
CHUNKED = "Transfer-Encoding: chunked"
ALIVE = ("Connection: keep-alive", "Keep-Alive: timeout=5, max=100")


async def ask(server: RawServer, times: int = 1, path: str = "", rate=None, **settings) -> list[RequestRecord]:
    records = [RequestRecord(index=i, arrival_s=0.0) for i in range(times)]
    async with serving_raw(server), open_session(None, 5.0) as session:
        client = StreamClient(session, Target(base_url=server.url + path, model="m", **settings))
        for record in records:
            await client.send(record, Work("hello", 8, rate))
    return records


def json_answer(status: str, document: object, *headers: str) -> bytes:
    raw = json.dumps(document).encode()
    return head(status, f"Content-Length: {len(raw)}", *headers, kind="application/json") + raw


@pytest.mark.parametrize(
    ("answer", "keeps"),
    [
        (head("200 OK", CHUNKED, *ALIVE) + chunked(*PARTS), False),
        (head("200 OK", CHUNKED, "Connection: close") + chunked(*PARTS), False),
        (head("200 OK", CHUNKED) + chunked(*PARTS), True),
        (head("200 OK", f"Content-Length: {len(STREAM)}") + STREAM, True),
        (head("200 OK", version="1.0") + STREAM, False),
        (head("200 OK") + STREAM, False),
        (head("200 OK", CHUNKED) + chunked(*PARTS, ended=False), False),
        (head("200 OK", CHUNKED) + chunked(*PARTS, ended=False), True),
        (head("200 OK", CHUNKED) + chunked(*PARTS[:-1], ended=False), False),
        (head("200 OK", CHUNKED) + chunked(*PARTS[:-1]), True),
        (head("200 OK", CHUNKED) + chunked(*[bytes([byte]) for byte in STREAM]), True),
        (head("200 OK", kind="text/plain") + STREAM, False),
        (head("200 OK", kind="application/json") + STREAM, False),
        (head("200 OK") + STREAM.replace(b"\n", b"\r\n"), False),
        (head("200 OK") + STREAM.replace(b"\n", b"\r"), False),
        (head("200 OK") + b"\xef\xbb\xbf" + STREAM, False),
        (head("200 OK") + b": hello\n\nid: 1\nretry: 5\n" + STREAM.replace(b"data: ", b"data:"), False),
    ],
    ids=[
        *("says it keeps and closes", "closes", "keeps", "length", "HTTP 1.0", "no length", "no last chunk"),
        *("open after [DONE]", "cut after finish_reason", "no [DONE]", "single bytes", "text/plain", "called JSON"),
        *("CRLF", "CR", "byte order mark", "comments"),
    ],
)
async def test_however_a_server_ends_its_answers_each_request_is_measured(answer, keeps):
    for record in await ask(RawServer(lambda _: answer, keeps=keeps), times=3):
        assert (record.error, record.placed_tokens, record.output_tokens) == (None, 2, 2)
        assert record.finish_reason == "stop"
        assert record.sent_s <= record.chunks[0][0] <= record.end_s


async def test_without_usage_and_without_done_chunks_are_counted():
    stream = head() + ROLE + text("a") + text("b") + finish("stop")
    (record,) = await ask(RawServer(lambda _: stream))
    assert (record.error, record.num_tokens, record.prompt_tokens) == (None, 2, None)


@pytest.mark.parametrize(
    ("reason", "count", "tokens"), [({"type": "stop"}, 2.0, 2), (1, 2, 2), ("stop", 2.5, None), ("stop", True, None)]
)
async def test_odd_reasons_and_counts_make_a_record_that_can_be_read_again(reason, count, tokens):
    last = event({"choices": [{"delta": {}, "finish_reason": reason}]})
    counted = event({"choices": [], "usage": {"prompt_tokens": count, "completion_tokens": count}})
    (record,) = await ask(RawServer(lambda _: head() + text("a") + b"data:\n\n" + last + counted + DONE))
    assert (record.error, record.prompt_tokens, record.output_tokens) == (None, tokens, tokens)
    assert msgspec.json.decode(msgspec.json.encode(record), type=RequestRecord) == record


def strict(*known: str):
    """A server that refuses, by name, every field that it does not know."""

    def answer(body: dict[str, object]) -> bytes:
        for name in body:
            if name not in known:
                return json_answer(
                    "422 Unprocessable", {"detail": [{"type": "extra_forbidden", "loc": ["body", name]}]}
                )
        return head("200 OK") + ROLE + text("a") + finish("stop") + DONE

    return answer


PLAIN = ("model", "messages", "max_tokens", "temperature", "stream")


async def test_a_server_without_stream_options_is_asked_without_them():
    server = RawServer(strict(*PLAIN))
    records = await ask(server, times=3)
    assert [record.error for record in records] == [None] * 3
    assert ["stream_options" in body for body in server.bodies] == [True, False, False, False]


async def test_a_server_that_wants_max_completion_tokens_gets_them():
    def answer(body: dict[str, object]) -> bytes:
        if "max_tokens" in body:
            message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
            return json_answer("400 Bad Request", {"error": {"message": message}})
        return head("200 OK") + STREAM

    server = RawServer(answer)
    (record,) = await ask(server)
    assert record.error is None
    assert server.bodies[-1]["max_completion_tokens"] == 8


@pytest.mark.parametrize(
    ("settings", "hint"), [({"ignore_eos": True}, "--ignore-eos"), ({"rate": 8.0}, "--score-rate")], ids=str
)
async def test_a_field_that_was_asked_for_is_not_dropped_in_silence(settings, hint):
    server = RawServer(strict(*PLAIN, "stream_options"))
    (record,) = await ask(server, **settings)
    assert record.error == "http_422"
    assert hint in record.error_detail
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("answer", "kind", "says"),
    [
        (head() + text("a") + b'event: error\ndata: {"message": "no memory"}\n\n', "stream_error", "no memory"),
        (head() + text("a") + b"event: error\ndata: out of luck\n\n" + DONE, "stream_error", "out of luck"),
        (head() + text("a") + b'error: {"code": 500, "message": "slot lost"}\n\n', "stream_error", "slot lost"),
        (head() + text("a") + event({"error": {"message": "gone"}}), "stream_error", "gone"),
        (json_answer("200 OK", {"choices": [{"message": {"content": "a"}}]}), "no_stream", "choices"),
        (head(kind="text/html") + b"<html>hello</html>", "no_stream", "<html>"),
        (head("404 Not Found", "Content-Length: 0"), "http_404", "/v1/chat/completions"),
        (json_answer("400 Bad Request", {"error": {"message": "too long"}}), "http_400", "too long"),
        (head("200 OK", CHUNKED) + chunked(text("a"), ended=False), "disconnected", ""),
        (b"", "disconnected", ""),
    ],
)
async def test_what_is_no_answer_is_a_failure_that_says_what_came(answer, kind, says):
    (record,) = await ask(RawServer(lambda _: answer))
    assert record.error == kind
    assert says in record.error_detail


@pytest.mark.parametrize("status", ["307 Temporary Redirect", "308 Permanent Redirect"])
async def test_a_redirect_that_keeps_the_method_is_followed(status):
    async with serving_raw(RawServer(lambda _: head() + STREAM)) as there:
        moved = head(status, f"Location: {there.url}/v1/chat/completions", "Content-Length: 0")
        (record,) = await ask(RawServer(lambda _: moved))
    assert (record.error, record.placed_tokens) == (None, 2)


@pytest.mark.parametrize("status", ["301 Moved Permanently", "302 Found", "303 See Other"])
async def test_a_redirect_that_makes_a_get_of_it_names_the_address_to_give(status):
    async with serving_raw(RawServer(lambda _: head() + STREAM)) as there:
        moved = head(status, f"Location: {there.url}/v1/chat/completions", "Content-Length: 0")
        (record,) = await ask(RawServer(lambda _: moved))
        assert record.error == "redirected"
        assert there.url in record.error_detail


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/proxy", "/proxy/v1/"])
async def test_an_address_may_end_in_v1_or_not(path):
    server = RawServer(lambda _: head() + STREAM)
    await ask(server, path=path, endpoint="completions")
    assert server.paths == [path.rstrip("/").removesuffix("/v1") + "/v1/completions"]


async def test_a_server_that_lists_no_models_is_measured_by_name():
    async with serving_raw(RawServer(lambda _: head() + STREAM)) as server, open_session(None, 5.0) as session:
        with pytest.raises(TfserveError, match="answered 404 without a list of models; name one with --model"):
            await first_model(session, server.url)
        words = ("--base-url", server.url, "--model", "m", "--num-prompts", 4, "--dataset", "prompts")
        assert await asyncio.to_thread(run, *words) == 0
    assert {body["model"] for body in server.bodies} == {"m"}


async def test_prompts_are_sized_by_an_answer_that_is_not_streamed_where_streams_have_no_usage():
    def answer(body: dict[str, object]) -> bytes:
        if body["stream"]:
            return head() + text("a") + finish("stop") + DONE
        words = len(body["messages"][0]["content"].split())
        return json_answer("200 OK", {"choices": [], "usage": {"prompt_tokens": words + 10, "completion_tokens": 1}})

    async with serving_raw(RawServer(answer)) as server:
        words = ("--base-url", server.url, "--model", "m", "--num-prompts", 2, "--input-len", 50)
        assert await asyncio.to_thread(run, *words) == 0
    lengths = [len(body["messages"][0]["content"].split()) for body in server.bodies]
    assert lengths[-2:] == [40, 40]

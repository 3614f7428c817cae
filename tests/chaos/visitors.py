"""The clients of a chaos run: what each kind sends, how it leaves, and the result that it must get."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

MAX_LEN = 512
"""The server's max_model_len."""

PHASES = ("waiting", "prefill", "running", "paused", "loading")
PHASE_WEIGHTS = (1, 1, 1, 2, 4)
"""Number of clients that wait for each phase: short phases are hard to catch."""

RATES: tuple[float | str | None, ...] = (10, 20, 40, 400, "read", "auto", None)

Tag = tuple[int, int]
"""Prompt tokens and max_tokens, unique among the clients that wait for a phase, to find them in GET /v1/streams."""


class Broken(Exception):
    """The server did what it must never do."""


@dataclass
class Wish:
    """Waits until a stream is in this phase; `seen` gets the stream's id."""

    phase: str
    seen: asyncio.Future[str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Visitors:
    """All clients of one run; `outcomes` counts their results, `broken` lists violations."""

    def __init__(self, url: str, session: aiohttp.ClientSession, rng: random.Random) -> None:
        self._url = url
        self._session = session
        self._rng = rng
        self._wishes: dict[Tag, Wish] = {}
        self.outcomes: Counter[str] = Counter()
        self.broken: list[str] = []
        self.is_closing = False
        self._kinds: list[tuple[int, Callable[[], Awaitable[str]]]] = [
            (5, self.reads_to_the_end),
            (2, self.reads_slowly),
            (2, self.takes_it_whole),
            (2, self.leaves_without_a_word),
            (10, self.leaves_in_a_phase),
            (5, self.is_aborted_in_a_phase),
            (1, self.asks_too_much),
            (2, self.talks_nonsense),
            (1, self.hangs_up_within_its_request),
        ]

    async def one(self) -> None:
        """A client of some kind, from arrival to its end."""
        weights = [weight for weight, _ in self._kinds]
        (_, visit) = self._rng.choices(self._kinds, weights)[0]
        name = getattr(visit, "__name__", "")
        try:
            async with asyncio.timeout(120):
                outcome = await visit()
        except Broken as error:
            self.broken.append(f"{name}: {error}")
            outcome = "BROKEN"
        except TimeoutError:
            self.broken.append(f"{name}: no end within 120 s")
            outcome = "BROKEN"
        except aiohttp.ClientError as error:
            # After SIGTERM a connection may be refused.
            if not self.is_closing:
                self.broken.append(f"{name}: {error!r}")
            outcome = "server has ended" if self.is_closing else "BROKEN"
        self.outcomes[f"{name}: {outcome}"] += 1

    async def hunt(self) -> None:
        """Poll all streams, and notify the clients that wait for a phase."""
        while True:
            try:
                async with self._session.get(self._url + "/v1/streams") as response:
                    streams = (await response.json())["data"] if response.status == 200 else []
            except aiohttp.ClientError:
                streams = []
            for stream in streams:
                phase = (
                    "prefill" if stream["phase"] == "running" and not stream["num_output_tokens"] else stream["phase"]
                )
                wish = self._wishes.get((stream["num_prompt_tokens"], stream["max_tokens"]))
                if wish is not None and wish.phase == phase and not wish.seen.done():
                    wish.seen.set_result(stream["id"])
            await asyncio.sleep(0.01)

    # The kinds

    async def reads_to_the_end(self) -> str:
        async with self._ask(self._body()) as response:
            return await self._end_of(response)

    async def reads_slowly(self) -> str:
        pause_s = self._rng.choice((0.01, 0.05, 0.2))
        async with self._ask(self._body()) as response:
            return await self._end_of(response, pause_s=pause_s)

    async def takes_it_whole(self) -> str:
        async with self._ask({**self._body(), "stream": False}) as response:
            answer = await response.json()
            if response.status == 200 and answer["choices"][0]["finish_reason"] == "length":
                return "done"
            return self._refusal(response, answer)

    async def leaves_without_a_word(self) -> str:
        try:
            async with asyncio.timeout(self._rng.random() * 0.5), self._ask(self._body()) as response:
                return await self._end_of(response)
        except TimeoutError:
            return "left"

    async def leaves_in_a_phase(self) -> str:
        async def leave(response: aiohttp.ClientResponse, _: str) -> None:
            response.close()

        return await self._in_a_phase(leave, "left while")

    async def is_aborted_in_a_phase(self) -> str:
        async def abort(_: aiohttp.ClientResponse, stream_id: str) -> None:
            body = {"request_id": stream_id}
            async with self._session.post(self._url + "/abort_request", json=body) as told:
                # 404: it has ended meanwhile.
                if told.status not in (200, 404):
                    raise Broken(f"/abort_request answered {told.status}: {await told.text()}")

        return await self._in_a_phase(abort, "aborted while")

    async def asks_too_much(self) -> str:
        many = self._rng.choice((MAX_LEN, MAX_LEN + 1, 20_000))
        async with self._ask({**self._body(), "prompt": [5] * many}) as response:
            return await self._must_be(response, 400)

    async def talks_nonsense(self) -> str:
        rubbish = self._rng.choice(
            (b"{", b"[]", b'"prompt"', b'{"prompt": [1, 2, 99999999]}', b'{"prompt": "x", "n": 0}', b"\xff\xfe", b"")
        )
        async with self._session.post(self._url + "/v1/completions", data=rubbish) as response:
            return await self._must_be(response, 400)

    async def hangs_up_within_its_request(self) -> str:
        host, _, port = self._url.rpartition("/")[2].partition(":")
        try:
            _, writer = await asyncio.open_connection(host, int(port))
        except OSError as error:
            raise aiohttp.ClientError(str(error)) from None
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
        await asyncio.sleep(self._rng.random() * 0.1)
        writer.close()
        return "left"

    # What they have in common

    def _body(self) -> dict[str, Any]:
        num_prompt = self._rng.choice((4, 40, 150, 300))
        return {
            "prompt": [self._rng.randrange(3, 500) for _ in range(num_prompt)],
            "max_tokens": self._rng.choice((1, 20, 100, 200, 200)),
            "ignore_eos": True,
            "stream": True,
            "temperature": self._rng.choice((0, 1)),
            "consumption_rate": self._rng.choice(RATES),
        }

    def _ask(self, body: dict[str, Any]) -> Any:
        return self._session.post(self._url + "/v1/completions", json=body)

    async def _in_a_phase(self, act: Callable[[aiohttp.ClientResponse, str], Awaitable[None]], verb: str) -> str:
        """Act as soon as the own stream is in a certain phase; if it never is, read to the end."""
        body, tag = self._body(), (0, 0)
        while tag == (0, 0) or tag in self._wishes:
            tag = self._rng.randrange(20, 300), self._rng.randrange(50, MAX_LEN - 300)
        body |= {"prompt": [7] * tag[0], "max_tokens": tag[1], "consumption_rate": self._rng.choice((5, 10, 20))}
        wish = self._wishes[tag] = Wish(self._rng.choices(PHASES, PHASE_WEIGHTS)[0])
        try:
            async with self._ask(body) as response:
                reading = asyncio.ensure_future(self._end_of(response))
                await asyncio.wait((reading, wish.seen), return_when=asyncio.FIRST_COMPLETED)
                if reading.done():
                    return f"{await reading} before it was {wish.phase}"
                await act(response, wish.seen.result())
                if response.closed:
                    reading.cancel()
                    await asyncio.wait((reading,))
                    return f"{verb} {wish.phase}"
                end = await reading
                return f"{verb} {wish.phase}" if end == "error aborted" else f"{end} before its abort"
        finally:
            del self._wishes[tag]

    async def _end_of(self, response: aiohttp.ClientResponse, pause_s: float = 0.0) -> str:
        """Read a stream to its end. Raises Broken if that is neither finish nor error, or lacks [DONE]."""
        if response.status != 200:
            return self._refusal(response, await response.json())
        finish, error, last = None, None, b""
        try:
            async for line in response.content:
                if not line.startswith(b"data: "):
                    continue
                last = line[6:].strip()
                if last != b"[DONE]":
                    chunk = json.loads(last)
                    error = chunk.get("error") or error
                    for choice in chunk.get("choices", ()):
                        finish = choice["finish_reason"] or finish
                if pause_s:
                    await asyncio.sleep(pause_s)
        except aiohttp.ClientError as lost:
            raise Broken(f"the stream was cut off: {lost!r}") from None
        if last != b"[DONE]" or (finish is None and error is None):
            raise Broken(f"the stream ended with {last[:200]!r}, finish {finish}, error {error}")
        if error is None:
            return "done"
        if error["code"] != "aborted":
            raise Broken(f"error {error}")
        return "error aborted"

    def _refusal(self, response: aiohttp.ClientResponse, answer: dict[str, Any]) -> str:
        """Name a refusal that is in order. Raises Broken for any other."""
        code = answer.get("error", {}).get("code")
        if response.status == 429 and code == "queue_full" and int(response.headers["Retry-After"]) >= 1:
            return "refused: queue full"
        if self.is_closing and response.status == 503 and code in ("draining", "aborted"):
            return f"refused: {code}"
        raise Broken(f"status {response.status}: {answer}")

    async def _must_be(self, response: aiohttp.ClientResponse, status: int) -> str:
        answer = await response.json()
        if response.status == status and answer["error"]["message"]:
            return f"status {status}"
        return self._refusal(response, answer)

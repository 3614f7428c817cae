"""The live page in a real browser: reading speed, stop, errors in words, and a picture of two hundred streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.browser.conftest import OpenPage
from tests.browser.crowd import DRY, NUM_STREAMS, PHASES, TOKENS_PER_S, CrowdEngine
from tests.http.conftest import Running, StartServer
from tests.http.fakes import FakeStream
from tests.http.test_server import ServerProcess
from tfserve.install_hint import install_command
from tfserve.types import FinishReason

axe = pytest.importorskip("axe_playwright_python.async_playwright", reason=f"needs {install_command('browser')}")
playwright = pytest.importorskip("playwright.async_api", reason=f"needs {install_command('browser')}")
expect = playwright.expect

pytestmark = [pytest.mark.slow, pytest.mark.browser]

TEXT = "Four of these characters make a token, and there are a lot. " * 20
NUM_TOKENS = len(TEXT) // 4
ONE_TICK = 3
"""Characters that one tick of the page's clock, 50 ms, is worth at most in these tests."""


async def asked(server: Running, page: Any, question: str = "Why?") -> FakeStream:
    """Type a question and send it. Returns the engine's side of the request."""
    server.engine.submitted.clear()
    await page.get_by_label("Your message").fill(question)
    await page.get_by_label("Your message").press("Enter")
    await asyncio.wait_for(server.engine.submitted.wait(), 10)
    stream = server.engine.live[-1]
    assert isinstance(stream, FakeStream)
    return stream


async def num_visible(page: Any) -> int:
    return len(await page.locator(".assistant").last.text_content())


async def test_text_appears_at_the_readers_own_speed(start: StartServer, open_page: OpenPage) -> None:
    server = await start(reply=None)
    opened = await open_page(server.url, is_paused=True)
    page = opened.page
    stream = await asked(server, page)
    stream.say(TEXT, tokens=NUM_TOKENS)
    await expect(page.locator("#mine-text")).to_have_text(f"{NUM_TOKENS / 6:.1f} s ahead of you")
    await page.clock.run_for(5000)
    assert await num_visible(page) == pytest.approx(5 * 6 * 4, abs=ONE_TICK)
    await page.get_by_role("slider", name="Reading speed").fill("12")
    await page.clock.run_for(5000)
    assert await num_visible(page) == pytest.approx(5 * (6 + 12) * 4, abs=2 * ONE_TICK)
    assert TEXT.startswith(await page.locator(".assistant").text_content())
    # The report to the scheduler is in tokens.
    await expect_played(stream, 5 * (6 + 12))
    stream.say("", FinishReason.STOP)
    await page.get_by_role("button", name="Show all").click()
    await expect(page.locator(".assistant")).to_have_text(TEXT.strip())
    await expect(page.locator(".facts")).to_contain_text(f"{NUM_TOKENS} tokens")
    opened.check()


async def expect_played(stream: FakeStream, num_tokens: int) -> None:
    for _ in range(100):
        if stream.played and abs(stream.played[-1] - num_tokens) <= 2:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"the last report should say about {num_tokens} tokens: {stream.played}")


async def test_a_reader_who_had_to_wait_reads_on_at_the_same_speed(start: StartServer, open_page: OpenPage) -> None:
    server = await start(reply=None)
    opened = await open_page(server.url, is_paused=True)
    stream = await asked(server, opened.page)
    stream.say(TEXT[:40], tokens=10)
    await expect(opened.page.locator("#mine-text")).to_contain_text("ahead")
    await opened.page.clock.run_for(30_000)
    assert await num_visible(opened.page) == 40
    stream.say(TEXT[40:], tokens=NUM_TOKENS - 10)
    await expect(opened.page.locator("#mine-text")).not_to_have_text("0.0 s ahead of you")
    await opened.page.clock.run_for(2000)
    assert await num_visible(opened.page) == pytest.approx(40 + 2 * 6 * 4, abs=ONE_TICK)
    opened.check()


async def test_stop_ends_the_request_and_keeps_what_was_read(start: StartServer, open_page: OpenPage) -> None:
    server = await start(reply=None)
    opened = await open_page(server.url, is_paused=True)
    page = opened.page
    stream = await asked(server, page)
    stream.say(TEXT, tokens=NUM_TOKENS)
    await expect(page.locator("#mine-text")).to_contain_text("ahead")
    await page.clock.run_for(2000)
    await page.get_by_role("button", name="Stop").click()
    await asyncio.wait_for(stream.aborted.wait(), 10)
    await page.clock.run_for(10_000)
    read = await page.locator(".assistant").text_content()
    assert len(read) == pytest.approx(2 * 6 * 4, abs=ONE_TICK)
    # The conversation contains the text that was shown, not all that was generated.
    await expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    again = await asked(server, page, "And?")
    assert bytes(again.prompt).decode() == f"<user>Why?<assistant>{read}<user>And?<assistant>"
    opened.check()


async def test_the_keyboard_is_enough(start: StartServer, open_page: OpenPage) -> None:
    server = await start(reply=None)
    opened = await open_page(server.url)
    page = opened.page
    await page.get_by_role("button", name="Why is the sky blue?").focus()
    await page.keyboard.press("Enter")
    await asyncio.wait_for(server.engine.submitted.wait(), 10)
    await expect(page.get_by_label("Your message")).to_be_focused()
    await page.keyboard.press("Escape")
    await asyncio.wait_for(server.engine.live[0].aborted.wait(), 10)
    await expect(page.get_by_role("button", name="Send")).to_be_visible()
    await page.keyboard.press("Shift+Tab")
    await page.keyboard.press("Shift+Tab")
    await expect(page.get_by_role("button", name="New chat")).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(page.locator("#talk p")).to_have_count(0)
    opened.check()


async def test_a_server_that_wants_a_key_says_so_and_takes_it(start: StartServer, open_page: OpenPage) -> None:
    server = await start(api_keys=["secret"])
    page = (await open_page(server.url)).page
    await expect(page.locator("#about")).to_contain_text("wants an API key")
    await page.get_by_label("Your message").fill("Why?")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("alert")).to_contain_text("wants an API key")
    await expect(page.get_by_label("Your message")).to_have_value("Why?")
    await page.get_by_label("API key").fill("secret")
    await page.keyboard.press("Enter")
    await expect(page.locator("#about")).to_have_text("live")
    await page.get_by_label("Your message").press("Enter")
    await expect(page.locator(".assistant")).to_have_text("Hello, wide world")


async def test_an_engines_error_and_a_refusal_are_told_in_words(start: StartServer, open_page: OpenPage) -> None:
    server = await start(reply=None)
    page = (await open_page(server.url)).page
    stream = await asked(server, page)
    stream.say("half a")
    await expect(page.locator(".assistant")).to_have_text("half a")
    stream.fail("logits are not finite")
    await expect(page.get_by_role("alert")).to_have_text("logits are not finite")
    await expect(page.locator(".assistant")).to_have_text("half a")
    server.engine.queue_full = True
    await page.get_by_label("Your message").fill("And?")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("alert").last).to_have_text("too many requests wait Try again in 3 s.")


@pytest.fixture
def mortal() -> Iterator[ServerProcess]:
    """A server in a process of its own, to be killed."""
    server = ServerProcess("load_chatty")
    server.wait_until_ready()
    yield server
    server.process.kill()
    server.process.communicate()


async def test_a_server_that_is_gone_is_told_in_words(mortal: ServerProcess, open_page: OpenPage) -> None:
    page = (await open_page(mortal.url)).page
    await expect(page.locator("#about")).to_have_text("live")
    await page.get_by_label("Your message").fill("Why?")
    await page.keyboard.press("Enter")
    await expect(page.locator(".assistant")).to_contain_text("w")
    mortal.process.kill()
    await expect(page.get_by_role("alert")).to_have_text("The connection was lost before the answer was complete.")
    await expect(page.locator("#about")).to_contain_text("The server does not answer", timeout=10_000)
    await page.get_by_label("Your message").fill("Still there?")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("alert").last).to_contain_text("The server does not answer")


@pytest.fixture
async def crowded(start: StartServer) -> Running:
    return await start(reply=None, engine_class=CrowdEngine)


async def test_every_one_of_two_hundred_streams_is_a_bar(crowded: Running, open_page: OpenPage) -> None:
    opened = await open_page(crowded.url)
    page = opened.page
    await expect(page.locator(".stream")).to_have_count(NUM_STREAMS)
    for phase in ("running", "paused", "loading", "waiting"):
        await expect(page.locator(f".stream.{phase}")).to_have_count(PHASES.count(phase))
        await expect(page.locator(f"#num-{phase}")).to_have_text(str(PHASES.count(phase)))
    await expect(page.locator(".stream.dry")).to_have_count(DRY)
    has_begun = NUM_STREAMS - PHASES.count("waiting")
    for name, text in (
        ("served", f"{has_begun - DRY} of {NUM_STREAMS}"),
        ("queue", "80"),
        ("queue-text", "no text yet, up to 8 s"),
        ("device", "95 %"),
        ("device-text", "device KV of 32k tokens"),
        ("host", "40 %"),
        ("preemptions", "137"),
        ("policy", "fcfs"),
    ):
        await expect(page.locator(f"#{name}")).to_have_text(text)
    # Stream 49 is paused with 5.9 s of text: 59 % of a bar that is full at 10 s.
    lengths = await page.evaluate(
        "() => [...document.querySelectorAll('.stream .bar')].map((bar) =>"
        " bar.firstElementChild.getBoundingClientRect().width / bar.getBoundingClientRect().width)"
    )
    states = await crowded.engine.streams()
    expected = [min((state.time_to_empty_s or 0.0) / 10, 1.0) for state in states]
    assert lengths == pytest.approx(expected, abs=0.02)
    opened.check()


async def test_speeds_are_those_of_the_engine(crowded: Running, open_page: OpenPage) -> None:
    opened = await open_page(crowded.url)
    page = opened.page
    await page.wait_for_function("() => history.length >= 6")
    shown = [float((await page.locator(name).text_content()).split()[0]) for name in ("#throughput", "#effective")]
    in_time = PHASES.count("running") + PHASES.count("loading")
    ahead = PHASES.count("paused")
    assert shown == pytest.approx([TOKENS_PER_S * (in_time + ahead), TOKENS_PER_S * in_time], rel=0.1)
    opened.check()


async def test_two_hundred_streams_leave_the_page_usable(crowded: Running, open_page: OpenPage) -> None:
    opened = await open_page(crowded.url)
    page = opened.page
    await page.evaluate(
        "() => { window.long = []; new PerformanceObserver((list) => window.long.push(...list.getEntries()"
        ".map((entry) => entry.duration))).observe({ type: 'longtask', buffered: true }); }"
    )
    stream = await asked(crowded, page)
    stream.say(TEXT, tokens=NUM_TOKENS)
    await expect(page.locator(".stream.own")).to_have_count(1)
    await page.get_by_label("Your message").press_sequentially("typed while all of them move")
    await expect(page.get_by_label("Your message")).to_have_value("typed while all of them move")
    seconds = await page.evaluate("() => performance.now() / 1000")
    print(f"tasks over 50 ms in {seconds:.1f} s: {json.dumps(await page.evaluate('() => window.long'))}")
    opened.check()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1440, 900), (1100, 800), (360, 740)])
async def test_it_is_legible_and_accessible(
    crowded: Running, open_page: OpenPage, scheme: str, width: int, height: int
) -> None:
    opened = await open_page(crowded.url, width=width, height=height, scheme=scheme)
    page = opened.page
    stream = await asked(crowded, page)
    stream.say("An answer.", FinishReason.STOP)
    await expect(page.locator(".facts")).to_be_visible()
    await expect(page.locator(".stream")).to_have_count(NUM_STREAMS + 1)
    result = await axe.Axe().run(page)
    assert result.violations_count == 0, result.generate_report()
    # Nothing to scroll sideways for.
    assert await page.evaluate("() => document.documentElement.scrollWidth") <= width
    opened.check()

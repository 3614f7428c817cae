"""A headless Chromium of the system, and the page of a server on a real loopback port in it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from benchmarks.chromium import FLAGS, MISSING, find_chromium
from tests.http.conftest import start
from tfserve.install_hint import install_command

__all__ = ["start"]


class Opened:
    """A page, its console errors, and the hosts of its requests."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.hosts: set[str] = set()
        self._url = url
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))

    def check(self) -> None:
        """The console is clean, and all requests went to the server."""
        assert self.complaints == []
        assert self.hosts <= {urlsplit(self._url).netloc, ""}  # data: addresses have no host

    def _on_console(self, message: Any) -> None:
        if message.type in {"error", "warning"}:
            self.complaints.append(message.text)


OpenPage = Callable[..., Awaitable[Opened]]


@pytest.fixture
async def open_page(tmp_path: Path) -> AsyncIterator[OpenPage]:
    """Open the page of a server: `await open_page(url, width=1440, scheme="dark", is_paused=True)`.

    With `is_paused` only `page.clock.run_for(ms)` moves the page's clock: the test does not depend on the machine's
    speed.
    """
    playwright = pytest.importorskip("playwright.async_api", reason=f"needs {install_command('browser')}")
    program = find_chromium()
    if program is None:
        pytest.skip(MISSING)
    async with playwright.async_playwright() as driver:
        context = await driver.chromium.launch_persistent_context(
            tmp_path / "profile", executable_path=program, args=FLAGS, viewport=None
        )

        async def begin(
            url: str, width: int = 1440, height: int = 900, scheme: str = "light", is_paused: bool = False
        ) -> Opened:
            page = await context.new_page()
            await page.set_viewport_size({"width": width, "height": height})
            await page.emulate_media(color_scheme=scheme)
            if is_paused:
                await page.clock.install(time=0)
                await page.clock.pause_at(1000)
            opened = Opened(page, url)
            await page.goto(url)
            return opened

        yield begin
        await context.close()

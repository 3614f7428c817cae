"""Screenshots of the live page during a burst: the same readers under two policies, and a full page.

    python -m benchmarks.burst.page_screenshots --output docs/images

The demo server, its KV on the device a quarter of what the burst needs. Every picture is taken `--at-s` after all
prompts have come at once. They only illustrate; `benchmarks.burst.run` measures. Needs the
extra browser and the system's Chromium.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from benchmarks.burst.run import BLOCK_SIZE, burst_rows, burst_tokens
from benchmarks.chromium import FLAGS, MISSING, find_chromium
from benchmarks.local_server import CLIENT_NICE, free_port, running
from tfserve.bench.workload import write_rows
from tfserve.model.loading.demo import demo_model_dir

KV_SHARE = 0.25
WIDTH, HEIGHT = 1440, 900
LIVE_HEIGHT = 520
"""Pixels of the page in which the streams of one policy fit."""

QUESTION = "How does a bicycle stay upright?"
HEAD_START_S = 6.0
"""How long before the crowd the picture's own conversation begins."""


class Burst:
    """`count` readers of `rate` tokens/s at once, before a server with one policy."""

    def __init__(self, work: Path, policy: str, count: int, rate: float, threads: int) -> None:
        model, rows = demo_model_dir(), burst_rows(count)
        self._prompts = work / f"{count}.jsonl"
        write_rows(self._prompts, rows)
        self._count, self._rate = len(rows), rate
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        settings = {
            "served_model_name": "smollm2-135m-instruct",
            "dtype": "float32",
            "quantization": "int8",
            "threads": threads,
            "max_num_seqs": count,
            "block_size": BLOCK_SIZE,
            "num_gpu_blocks_override": round(KV_SHARE * burst_tokens(model, rows)) // BLOCK_SIZE + 1,
            "host_kv_gib": 1,
            "scheduler.policy": policy,
            "server.port": self._port,
        }
        words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
        self._server = [sys.executable, "-m", "tfserve.cli", "serve", str(model), *words]

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """The server, until the end of the block."""
        with running(self._server, self.url, "/ready"):
            yield

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """The readers, until the end of the block."""
        command = [*CLIENT_NICE, sys.executable, "-m", "tfserve.cli", "bench", "serve", "--base-url", self.url]
        command += ["--endpoint", "chat", "--prompts", str(self._prompts), "--num-prompts", str(self._count)]
        command += ["--request-rate", "burst", "--ignore-eos", "--rate", str(self._rate)]
        client = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            client.terminate()
            client.wait(30)


def wait_for_streams(page: Page, count: int) -> None:
    page.wait_for_function("count => document.querySelectorAll('.stream').length >= count", arg=count, timeout=60_000)


def picture_policy(page: Page, burst: Burst, count: int, at_s: float, target: Path) -> None:
    """The live half of the page, `at_s` after the burst."""
    with burst.serving():
        page.set_viewport_size({"width": WIDTH, "height": LIVE_HEIGHT})
        page.goto(burst.url)
        with burst.reading():
            wait_for_streams(page, count)
            time.sleep(at_s)
            page.locator("#live").screenshot(path=target)


def picture_page(page: Page, burst: Burst, count: int, at_s: float, target: Path) -> None:
    """The whole page, with a conversation of its own."""
    with burst.serving():
        page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
        page.goto(burst.url)
        page.get_by_label("Your message").fill(QUESTION)
        page.keyboard.press("Enter")
        time.sleep(HEAD_START_S)
        with burst.reading():
            wait_for_streams(page, count)
            time.sleep(at_s)
            page.screenshot(path=target)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Any = parser.add_argument
    add("--output", type=Path, default=Path("docs/images"))
    add("--num-prompts", type=int, default=48, help="readers before each policy (default: %(default)s)")
    add("--rate", type=float, default=2.0, help="tokens/s that each of them reads (default: %(default)s)")
    add("--at-s", type=float, default=20.0, help="seconds from the burst to the picture (default: %(default)s)")
    add("--crowd", type=int, default=200, help="readers on the whole page (default: %(default)s)")
    add("--crowd-rate", type=float, default=0.3, help="tokens/s that each of those reads (default: %(default)s)")
    add("--crowd-at-s", type=float, default=60.0, help="seconds until its picture (default: %(default)s)")
    add("--threads", type=int, default=2)
    add("--only", choices=("fcfs", "tokenflow", "page"), help="one of the pictures")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    program = find_chromium()
    if program is None:
        raise SystemExit(MISSING)
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=FLAGS)
        page = browser.new_page(color_scheme="light")
        for policy in ("fcfs", "tokenflow"):
            if args.only in {None, policy}:
                burst = Burst(Path(folder), policy, args.num_prompts, args.rate, args.threads)
                picture_policy(page, burst, args.num_prompts, args.at_s, args.output / f"live-{policy}.png")
        if args.only in {None, "page"}:
            burst = Burst(Path(folder), "tokenflow", args.crowd, args.crowd_rate, args.threads)
            picture_page(page, burst, args.crowd, args.crowd_at_s, args.output / "live-page.png")
        browser.close()


if __name__ == "__main__":
    main()

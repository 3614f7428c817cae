"""A process that has freed memory gives it back, wherever in its heap that was."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import time, psutil
from tfserve.heap import trim_heap

def resident():
    return psutil.Process().memory_info().rss

def grow():
    blocks = [bytes([number % 255 + 1]) * 100_000 for number in range(2000)]
    return blocks[::20]  # so that what is free is in pieces

before = resident()
trim_heap(every_s=0.1)
kept = grow()
deadline = time.monotonic() + 20
while resident() > before + 80_000_000 and time.monotonic() < deadline:
    time.sleep(0.05)
print(resident() - before)
assert all(len(set(block)) == 1 for block in kept)
"""


def test_memory_that_was_freed_in_pieces_goes_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True)
    assert int(done.stdout) <= 80_000_000

"""A process gives freed memory back, wherever in its heap that was, and does not keep a kernel for every batch size."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tfserve.engine.frontend.core_client import ENVIRONMENT

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


SIZES = """
import psutil, torch
from tfserve.model.layers.linear import Linear, WeightFormat

torch.set_num_threads(1)
layer = Linear(64, 128, False, WeightFormat.choose(torch.float32, torch.device("cpu"), None))
layer.load(torch.ones(128, 64), None)

def grown(sizes):
    before = psutil.Process().memory_info().rss
    for rows in sizes:
        layer(torch.ones(rows, 64))
    return psutil.Process().memory_info().rss - before

grown(range(1, 100))
print(grown(range(100, 500)))
"""


def test_ever_new_batch_sizes_do_not_make_a_process_grow() -> None:
    def growth(environment: dict[str, str]) -> int:
        command = [sys.executable, "-c", SIZES]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | environment)
        return int(done.stdout)

    unbounded = growth({})
    if unbounded < 20_000_000:
        pytest.skip("this build of torch keeps no kernels")
    assert growth(ENVIRONMENT) < unbounded / 4

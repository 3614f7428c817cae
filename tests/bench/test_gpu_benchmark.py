"""The GPU benchmark itself, on a CPU with a tiny shape: every section runs, and its file has the expected entries."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu") / "results/gpu.json"
    # One thread: the steps of a shape this small are shorter than waking a second one.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--device", "cpu", "--shape", "tiny", "--output", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())


def cells(results, section: str) -> list[dict]:
    return results["sections"][section]["cells"]


def test_the_file_says_where_and_how_it_was_measured(results):
    assert {"date", "command", "python", "packages", "device", "shape", "ceilings"} <= results.keys()
    assert all(value > 0 for value in results["ceilings"].values())
    assert results["packages"]["torch"]


def test_every_cell_stands_beside_its_roofline_or_says_why_it_was_not_measured(results):
    found = cells(results, "steps")
    assert {(cell["batch"], cell["context"]) for cell in found if cell["kind"] == "decode"} == {
        (batch, context) for batch in (1, 4) for context in (32, 64)
    }
    for cell in found:
        assert cell["kind"] == "profile" or cell.get("over_roofline", 0) > 0 or cell["skipped"]
    assert found[-1]["kind"] == "profile"
    assert all(value >= 0 for value in found[-1]["coefficients"].values())


def test_copies_were_moved_alone_and_under_decoding(results):
    kinds = {cell["kind"]: cell for cell in cells(results, "copies")}
    for direction in ("store", "load"):
        assert kinds[f"{direction} of blocks, alone"]["bytes_per_s"] > 0
        assert kinds[f"{direction} under decoding"]["bytes_per_s"] > 0


def test_a_preemption_with_write_through_leaves_less_to_move(results):
    through, without = cells(results, "preemption")
    assert through["write_through"]
    assert not without["write_through"]
    assert through["dirty_tokens"] == 0
    assert without["dirty_tokens"] == without["loaded_tokens"] == 64


def test_both_policies_serve_the_whole_burst(results):
    found = cells(results, "burst")
    assert [cell["policy"] for cell in found] == ["fcfs", "tokenflow"]
    for cell in found:
        assert cell["complete"]
        assert cell["finished"] == 12
        assert not cell["errors"]


def test_without_a_gpu_the_default_run_says_so():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.run"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "no NVIDIA GPU" in done.stderr

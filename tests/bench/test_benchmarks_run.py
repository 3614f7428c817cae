"""Every benchmark of the repository still runs: small, and for its exit code only."""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys

import pytest

import benchmarks

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.")
    if not module.ispkg and not module.name.endswith("__main__")
)

SMALL = {
    "micro.http_speed": "--rate 500 --streams 4 --seconds 1",
    "micro.scheduler_cost": "--live 50 --seconds 2",
    "micro.attention_cpu": "2,64 --runs 1",
}

SLOW = {
    "micro.pipeline": "--devices emulated --streams 4 --step-ms 2 --tokens 8 --repeats 1",
    "attack.run": "lengths-bias",
    "burst.run": "--policies fcfs --rate 20 --num-prompts 2 --kv-share 2 --repeats 1 --output {out}/burst.json",
    "exactness.run": "--requests 2 --tokens 8 --least 1 --mode load --sampling greedy",
    "exactness.int8_quality": "--max-tokens 64 --output {out}/int8.json",
}


@pytest.mark.parametrize("name", MODULES)
def test_a_benchmark_can_be_imported(name):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in {"benchmarks", "tests", "tfserve"}:
            raise
        pytest.skip(f"an extra is not installed: {error}")


@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_benchmark_runs_to_its_end(name, tmp_path):
    words = (SMALL | SLOW)[name].format(out=tmp_path).split()
    command = [sys.executable, "-m", f"benchmarks.{name}", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr

"""The paper's experiments: workloads, result files, and the same bytes for the same seeds."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest

from benchmarks.paper import cli as paper_cli
from benchmarks.paper.bounds import fluid_of_run, peak_demand
from benchmarks.paper.cases import Case, Experiment
from benchmarks.paper.experiments import experiments
from benchmarks.paper.hardware import PROFILES
from benchmarks.paper.summary import Estimate
from benchmarks.paper.targets import targets
from benchmarks.paper.workloads import Burst, Normal, Poisson, Sampled, Trace, Workload, read_columns
from tfserve.config import config_from
from tfserve.engine.scheduling.qos import Served, effective_tokens
from tfserve.errors import TfserveError


def run_paper(*args: object) -> int:
    return paper_cli.bench_paper(paper_cli.arguments(list(map(str, args))))


SMALL = Normal(64, 100)


def tiny_experiment() -> Experiment:
    profile = msgspec.structs.replace(PROFILES["4090-llama3-8b"], memory_fraction=0.69)
    workload = Workload(arrivals=Burst(12), lengths=SMALL, rates=((0.5, 15.0), (0.5, 20.0)))
    return Experiment(
        key="4090-a",
        section="The eight set-ups",
        title="tiny",
        claim="nothing",
        cases=[
            Case(name=name, profile=profile, workload=workload, settings={"policy": name})
            for name in ("fcfs", "tokenflow")
        ],
        seeds=2,
        in_quick=True,
        plots=("ttft", "throughput", "queue", "timelines", "fans"),
    )


def test_the_same_seed_gives_the_same_requests_and_another_seed_others():
    workload = Workload(arrivals=Poisson(50, 2.0), lengths=SMALL, rates=((0.4, 15.0), (0.6, 20.0)))
    assert workload.requests(3) == workload.requests(3)
    assert workload.requests(3) != workload.requests(4)


def test_lengths_are_normal_within_their_clamps_and_rates_keep_their_shares():
    asked = Workload(arrivals=Burst(4000), lengths=Normal(512, 1024), rates=((0.4, 15.0), (0.6, 20.0))).requests(0)
    outputs = np.array([request.output_tokens for request in asked])
    assert outputs.mean() == pytest.approx(1024, rel=0.02)
    assert outputs.std() == pytest.approx(0.2 * 1024, rel=0.05)
    assert outputs.max() <= 2048
    assert np.mean([request.rate == 15.0 for request in asked]) == pytest.approx(0.4, abs=0.03)


def test_what_the_server_is_told_changes_neither_lengths_nor_true_rates():
    base = Workload(arrivals=Burst(30), lengths=SMALL, rates=((0.5, 10.0), (0.5, 30.0)))
    for told in ("blunt", "wrong"):
        other = msgspec.structs.replace(base, told=told, looseness=2.0).requests(1)
        for mine, its in zip(base.requests(1), other, strict=True):
            assert (mine.rate, mine.output_tokens) == (its.rate, its.output_tokens)
            assert 0.5 * mine.rate <= its.told_rate <= 2 * mine.rate
            assert its.max_tokens == 2 * its.output_tokens


def test_a_trace_is_replayed_in_its_window_at_its_speed():
    rows = read_columns("azure_code_20min.csv", ("arrival_s", "prompt_tokens", "output_tokens"))
    trace = Trace("azure_code_20min.csv", speed=2.0, window_s=60.0, most_tokens=1000)
    asked = Workload(arrivals=trace, lengths=Sampled()).requests(0)
    window = rows[rows[:, 0] < 60.0]
    assert [request.arrival_s for request in asked] == pytest.approx(list(window[:, 0] / 2))
    assert [request.prompt_tokens for request in asked] == list(np.minimum(window[:, 1], 1000))


def test_a_missing_trace_is_named():
    with pytest.raises(TfserveError, match=r"nowhere\.csv"):
        read_columns("nowhere.csv", ("arrival_s",))


def test_every_experiment_has_settings_that_exist_and_a_baseline_that_is_there():
    keys = [experiment.key for experiment in experiments()]
    assert len(keys) == len(set(keys))
    for experiment in experiments():
        names = {case.name for case in experiment.cases}
        assert len(names) == len(experiment.cases)
        for case in experiment.cases:
            config_from({"model": "m", "scheduler": case.settings})
            assert case.baseline in names


def test_peak_demand_counts_only_readers_at_a_time():
    asked = Workload(arrivals=Burst(3), lengths=SMALL).requests(0)
    assert peak_demand(asked) == 60
    apart = [msgspec.structs.replace(request, arrival_s=100.0 * i) for i, request in enumerate(asked)]
    assert peak_demand(apart) == 20


def test_sharing_ones_own_tokens_perfectly_is_worth_at_least_what_one_made_of_them():
    one_by_one = [Served(0.0, 20.0, 0.5 * i + np.linspace(0.01, 0.5, 100)) for i in range(10)]
    made = sum(map(effective_tokens, one_by_one)) / 5.0
    assert fluid_of_run(one_by_one) > 1.3 * made


def test_an_interval_is_students():
    estimate = Estimate.of([1.0, 2.0, 3.0])
    assert estimate.mean == 2.0
    assert estimate.half == pytest.approx(4.303 / 3**0.5)


def test_an_unknown_row_is_named_with_the_known_ones(tmp_path):
    with pytest.raises(TfserveError, match="4090-a"):
        run_paper("--out", tmp_path, "--only", "nothing")


def test_a_run_writes_its_page_tables_and_figures_and_the_same_bytes_again(tmp_path, monkeypatch):
    monkeypatch.setattr(paper_cli, "experiments", lambda **_: [tiny_experiment()])
    written = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        assert run_paper("--out", folder, "--workers", 1) == 0
        written.append({path.name: path.read_bytes() for path in folder.iterdir() if path.name != "timing.json"})
    assert written[0] == written[1]
    files = written[0]
    assert {"README.md", "runs.csv", "table.csv", "results.json", "series.json"} < files.keys()
    assert len([name for name in files if name.endswith(".png")]) == 5
    text = files["README.md"].decode()
    assert "simulated" in text
    assert all(name in text for name in files if name.endswith(".png"))
    lines = json.loads(files["results.json"])["lines"]
    assert [line["seeds"] for line in lines] == [2, 2]
    assert lines[1]["ratios"]["raw"]["mean"] > 0.9
    assert json.loads((tmp_path / "one" / "timing.json").read_bytes())["runs"] == 4


def test_targets_count_only_set_ups_that_have_run():
    assert all(target.of == 0 for target in targets([]))

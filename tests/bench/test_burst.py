"""The parts of the burst benchmark: requests, stored cells, tables. Without real servers."""

from __future__ import annotations

import json

import msgspec
import pytest

from benchmarks.burst import ablation
from benchmarks.burst.report import fluid_bound, prefill_bound, report
from benchmarks.burst.run import Burst, burst_rows, parse_args, parse_policy, scaled_mix, scored_at
from benchmarks.cells import Store
from tests.bench.test_scoring import record
from tfserve.bench.report import summarize
from tfserve.scheduler_sections import AblationConfig


def cell(policy="fcfs", repeat=0, step_s=0.1, preemptions=0):
    """Records of a burst of two readers, with a token every `step_s`."""
    records = [record([1.0 + step_s * k for k in range(10)], rate=10.0) for _ in range(2)]
    for each in records:
        each.prompt_tokens, each.num_preemptions, each.output_tokens = 30, preemptions, 10
    summary = json.loads(msgspec.json.encode(summarize(records, 2.0, 0.1)))
    engine = {"step": 9, "num_preemptions": 2 * preemptions, "bytes_stored": 2**20, "bytes_loaded": 0}
    requests = [{"prompt_tokens": 30, "output_tokens": 10, "rate": 10.0} for _ in records]
    return {"rate": 10.0, "ready_s": 1.0, "engine": engine, "summary": summary, "requests": requests}


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "deep" / "r.json", tmp_path / "records")
    store.open({"a": 1}, {"date": "now"})
    return store


def test_the_burst_is_the_issues_48_prompts():
    rows = burst_rows(48)
    assert len(rows) == 48
    assert {96, 160, 256} <= {row.max_tokens for row in rows}
    assert all(96 <= row.max_tokens <= 256 for row in rows)


def test_a_policy_may_carry_settings():
    settings = {"scheduler.ablation.offload": "false", "emulated_bandwidth": "2"}
    assert parse_policy("tokenflow+scheduler.ablation.offload=false+emulated_bandwidth=2") == ("tokenflow", settings)
    assert parse_policy("fcfs") == ("fcfs", {})


def test_a_mix_is_scaled_to_the_mean_and_keeps_its_proportions():
    low, high = (float(part.split(":")[0]) for part in scaled_mix({15.0: 0.4, 20.0: 0.6}, 3.6).split(","))
    assert 0.4 * low + 0.6 * high == pytest.approx(3.6, abs=1e-3)
    assert low / high == pytest.approx(0.75, abs=1e-3)


def test_a_run_goes_on_where_it_was_killed(store, tmp_path):
    store.add("fcfs", 0, cell())
    again = Store(tmp_path / "deep" / "r.json")
    again.open({"a": 1}, {"date": "later"})
    assert again.has("fcfs", 0)
    assert not again.has("fcfs", 1)
    again.add("fcfs", 1, cell())
    result = json.loads((tmp_path / "deep" / "r.json").read_text())
    assert [each["repeat"] for each in result["cells"]] == [0, 1]
    assert result["environment"] == {"date": "now"}
    assert "requests" not in result["cells"][0]
    assert len(json.loads((tmp_path / "records" / "fcfs-0.json").read_text())) == 2
    with pytest.raises(KeyError):
        again.get("tokenflow", 0)


def test_cells_of_other_settings_are_not_mixed_in(store, tmp_path):
    store.add("fcfs", 0, cell())
    with pytest.raises(SystemExit, match="other settings"):
        Store(tmp_path / "deep" / "r.json").open({"a": 2}, {})


def test_bounds_of_a_cell(store):
    store.add("prefill", 0, cell(step_s=0.0))
    store.add("fcfs", 0, cell())
    prefill, fcfs = store.cells()
    # 60 prompt tokens in one second; the P99 of two prompts done after 0.5 s and 1 s.
    assert prefill_bound(prefill) == pytest.approx(0.995)
    # Capacity 20/1.9, less than the 20/s that two readers want: everything is read at once.
    assert fluid_bound(fcfs) == pytest.approx(20 / 1.9, rel=0.01)


def test_the_table_pairs_each_repeat_with_its_fcfs(store):
    for repeat in range(2):
        store.add("prefill", repeat, cell(step_s=0.0))
        store.add("fcfs", repeat, cell(step_s=0.2))
        store.add("tokenflow", repeat, cell(step_s=0.1, preemptions=3))
    text = report(store.cells())
    tokenflow = text[text.index("\ntokenflow") :]
    rows = {line[:42].strip(): line[42:].split() for line in tokenflow.splitlines()}
    assert float(rows["raw / fcfs"][0]) == pytest.approx(2.8 / 1.9, abs=1e-3)
    assert float(rows["preemptions"][0]) == 3.0
    assert float(rows["stored, MiB"][0]) == 1.0
    assert float(rows["TTFT P99 / prefill bound"][0]) == pytest.approx(1 / 0.995, abs=1e-3)
    assert "raw / fcfs" not in text[: text.index("\ntokenflow")]


def test_classes_of_readers_are_kept_apart_though_every_repeat_has_its_own_rates(store):
    for repeat, rates in enumerate(([10.0, 20.0], [12.0, 24.0])):
        records = [record([1.0 + 0.1 * k for k in range(10)], rate=rate, tokens=10) for rate in rates]
        for each in records:
            each.num_preemptions = 0
        summary = json.loads(msgspec.json.encode(summarize(records, 2.0, 0.1)))
        store.add("fcfs", repeat, {**cell(), "summary": summary})
    lines = [line.split() for line in report(store.cells()).splitlines()]
    asked = [line for line in lines if line[2:4] == ["asked,", "tok/s"]]
    assert [(line[1], line[4]) for line in asked] == [("1:", "11.000"), ("2:", "22.000")]
    read = [[float(number.strip("[]")) for number in (line[3], line[5])] for line in lines if line[:1] == ["read,"]]
    # Ten tokens, one each 0.1 s, are read after 0.9 s and the last one's own time.
    slow, fast = ([10 / (0.9 + 1 / rate) for rate in rates] for rates in ((10, 12), (20, 24)))
    assert read == [pytest.approx(slow, abs=1e-3), pytest.approx(fast, abs=1e-3)]


def test_options_name_policies_and_settings():
    args = parse_args(["--policies", "fcfs,andes", "--server-option", "emulated_bandwidth=2"])
    assert args.policies == ["fcfs", "andes"]
    assert args.server_option == [("emulated_bandwidth", "2")]


def test_the_ablation_switches_one_part_off_at_a_time():
    known = {field.name for field in msgspec.structs.fields(AblationConfig)}
    assert set(ablation.SWITCHES) == known
    names = ablation.variants(1.5)
    assert [len(parse_policy(name)[1]) for name in names] == [1, 2, 2, 2, 2]
    assert len(set(names + ablation.variants(None))) == 10


def test_the_emulated_link_is_as_slow_as_the_gpus_for_its_step():
    bandwidth = ablation.equivalent_bandwidth(0.1) * 2**30
    here = ablation.TOKEN_BYTES / bandwidth / 0.1
    assert here == pytest.approx(ablation.GPU_TOKEN_BYTES / ablation.GPU_LINK_BYTES_PER_S / ablation.GPU_STEP_S)
    assert ablation.equivalent_bandwidth(0.2) == pytest.approx(ablation.equivalent_bandwidth(0.1) / 2)


def test_the_ablation_table_has_a_row_per_variant(store):
    store.add("prefill", 0, cell(step_s=0.0))
    store.add("tokenflow", 0, cell())
    store.add("tokenflow+scheduler.ablation.offload=false", 0, cell(preemptions=4))
    rows = ablation.table(store.cells()).splitlines()
    assert [row[:80].strip() for row in rows] == ["", "tokenflow", "tokenflow+scheduler.ablation.offload=false"]
    assert rows[2][80:].split()[6] == "4.00"


def test_a_run_without_rates_is_scored_once_the_rate_is_known():
    records = [record([1.0 + 0.1 * k for k in range(10)], rate=None, tokens=10) for _ in range(2)]
    requests, summary = (json.loads(msgspec.json.encode(each)) for each in (records, summarize(records, 2.0, 0.1)))
    before = {**cell(), "summary": summary, "requests": requests}
    after = scored_at(before, [10.0, 20.0], 15.0)
    assert before["summary"]["quality"] is None
    assert list(after["summary"]["quality_by_rate"]) == ["10", "20"]
    assert [request["rate"] for request in after["requests"]] == [10.0, 20.0]
    assert after["summary"]["output_tokens_per_s"] == before["summary"]["output_tokens_per_s"]
    assert after["summary"]["client_cpu_share"] == before["summary"]["client_cpu_share"]


class Scripted(Burst):
    """A fake measurement: every server makes 20 tokens in 1.9 s; its settings are recorded."""

    def __init__(self, args, store, folder):
        super().__init__(args, store, folder, kv_tokens=640)
        self.asked = []

    def measure(self, policy, settings, rows, readers):
        self.asked.append((policy, settings, [row.max_tokens for row in rows], readers))
        rate = 10.0 if readers else None
        records = [record([1.0 + 0.1 * k for k in range(10)], rate=rate, tokens=10) for _ in rows]
        requests, summary = (json.loads(msgspec.json.encode(each)) for each in (records, summarize(records, 2.0, 0.1)))
        return {**cell(), "summary": summary, "requests": requests}


def scripted(tmp_path, *words):
    args = parse_args(["--num-prompts", "2", "--output", str(tmp_path / "r.json"), *words])
    store = Store(args.output)
    burst = Scripted(args, store, tmp_path)
    store.open(burst.settings(), {})
    burst.run()
    return burst, [(each["policy"], each["repeat"]) for each in store.cells()]


def test_every_repeat_measures_the_bound_and_the_rate_first(tmp_path):
    burst, cells = scripted(tmp_path, "--policies", "fcfs,tokenflow,andes", "--repeats", "2")
    first, second = cells[:5], cells[5:]
    assert [policy for policy, _ in first] == ["prefill", "calibration", "fcfs", "tokenflow", "andes"]
    assert [policy for policy, _ in second] == ["prefill", "calibration", "fcfs", "tokenflow", "andes"]
    assert [policy for policy, *_ in burst.asked] == ["fcfs", "fcfs", "tokenflow", "andes"] * 2
    # 0.8 times 20 tokens in 1.9 s, for two readers.
    assert burst.asked[2][3] == ["--rate", f"{0.8 * 20 / 1.9 / 2:.4f}"]
    assert burst.asked[0][2] == [1, 1]


def test_a_run_in_pieces_measures_the_same_cells_once(tmp_path):
    words = ("--policies", "fcfs,tokenflow", "--repeats", "2")
    whole = scripted(tmp_path / "whole", *words)[1]
    asked = []
    for _ in range(6):
        burst, cells = scripted(tmp_path, *words, "--max-cells", "2")
        asked += burst.asked
    assert sorted(cells) == sorted(whole)
    assert len(asked) == 6


def test_one_rate_may_hold_for_the_whole_run_and_every_policy_may_be_capped(tmp_path):
    words = ("--policies", "fcfs,tokenflow", "--repeats", "2", "--calibrate", "run", "--generate-ahead-s", "2")
    burst, cells = scripted(tmp_path, *words, "--loose", "3")
    assert cells.count(("calibration", 0)) == 1
    assert ("calibration", 1) not in cells
    policies = [(policy, settings) for policy, settings, _, readers in burst.asked if readers]
    capped = {"scheduler.generate_ahead_s": "2.0"}
    assert policies == [("fcfs", capped), ("tokenflow", capped), ("tokenflow", capped), ("fcfs", capped)]
    assert sorted(burst.asked[1][2]) == sorted(3 * row.max_tokens for row in burst_rows(2))


def test_mixed_readers_are_told_to_the_client_with_the_mean_kept(tmp_path):
    burst, _ = scripted(
        tmp_path, "--policies", "tokenflow", "--repeats", "1", "--mix", "15:0.4,20:0.6", "--rate", "3.6"
    )
    option, mix, *_ = burst.asked[-1][3]
    assert (option, mix) == ("--rate-mix", "3.0000:0.4,4.0000:0.6")

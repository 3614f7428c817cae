from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tokenizers import write_tiny_tokenizer
from tfserve.cli import main

SHORT = ["--input-len", "8", "--output-len", "40", "--threads", "1", "--dtype", "float32", "--max-model-len", "64"]


@pytest.fixture(scope="module")
def model(tiny_llama3: Path) -> str:
    return str(write_tiny_tokenizer(tiny_llama3))


def test_every_batch_is_measured_beside_its_roofline(model: str, tmp_path: Path, capsys) -> None:
    file = tmp_path / "deep" / "result.json"
    words = ["bench", "engine", model, "--batches", "1,3", *SHORT, "--output", str(file), "--server.api_keys", "secret"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "GB/s" in shown
    assert "as fast as the roofline" in shown
    assert "secret" not in file.read_text()
    result = json.loads(file.read_text())
    assert [run["batch"] for run in result["batches"]] == [1, 3]
    for run in result["batches"]:
        prefill, decode = run["steps"]
        assert (prefill["kind"], decode["kind"]) == ("prefill", "decode")
        assert decode["tokens"] == run["batch"]
        # The first token comes with the prompts; the steps of a batch are its own, not the warm-up's.
        assert decode["num_steps"] <= 40 - 1
        assert 8 < decode["context"] <= 8 + 40
        assert decode["roofline_ms"] > 0
        assert decode["over_roofline"] == pytest.approx(decode["step_ms"] / decode["roofline_ms"], rel=0.5)
        assert run["output_tokens_per_s"] == pytest.approx(40 * run["batch"] / run["seconds"])


def test_a_batch_that_does_not_fit_is_skipped_and_says_so(model: str, capsys) -> None:
    words = ["bench", "engine", model, "--batches", "1,16,64", *SHORT, "--num-gpu-blocks-override", "9"]
    assert main([*words, "--block-size", "16", "--max-num-seqs", "16"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "64 skipped: max_num_seqs is 16" in shown
    assert "16 skipped: the device's KV holds 2 requests of 48 tokens" in shown


def test_requests_longer_than_the_model_allows_are_skipped(model: str, capsys) -> None:
    assert main(["bench", "engine", model, "--batches", "1", *SHORT[:-1], "10"]) == 0
    assert "skipped: a request of 48 tokens is longer than max_model_len, 10" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--batches", "1,0"], ["--input-len", "none"], ["--output-len", "0"]])
def test_bad_sizes_name_the_option(model: str, capsys, words: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "engine", model, *words])
    said = capsys.readouterr().err
    assert words[0] in said
    assert "must be" in said

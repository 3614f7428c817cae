from __future__ import annotations

import random

import pytest

from tfserve.bench.workload import (
    BUNDLED_PROMPTS,
    Lengths,
    PromptRow,
    PromptSize,
    arrival_times,
    mixed_rates,
    parse_clamp,
    parse_rate,
    parse_rate_mix,
    parse_request_rate,
    random_prompt,
    read_prompts,
    read_rows,
    write_rows,
)
from tfserve.errors import TfserveError


def test_infinite_rate_is_everything_at_once():
    assert (
        arrival_times(parse_request_rate("burst"), 3, seed=1)
        == arrival_times(parse_request_rate("inf"), 3, seed=2)
        == [0.0] * 3
    )


def test_poisson_arrivals_have_the_rate_and_repeat_with_the_seed():
    times = arrival_times(parse_request_rate("10"), 2001, seed=3)
    assert times == arrival_times(10.0, 2001, seed=3) != arrival_times(10.0, 2001, seed=4)
    assert times == sorted(times)
    assert times[0] == 0
    assert times[-1] / 2000 == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "fast"])
def test_a_rate_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"a rate must be a .*number above 0"):
        parse_request_rate(text)


def test_random_prompts_have_the_asked_words_and_differ():
    rng = random.Random(0)
    prompts = [random_prompt(12, rng) for _ in range(20)]
    assert {len(prompt.split()) for prompt in prompts} == {12}
    assert len(set(prompts)) == 20


def test_file_rows_are_each_used_before_any_repeats(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b", "id": 1}\n{"prompt": "c"}\n')
    prompts = read_prompts(path, 7, seed=5)
    texts = [row.prompt for row in prompts]
    assert sorted(texts[:3]) == sorted(texts[3:6]) == ["a", "b", "c"]
    assert len(prompts) == 7


@pytest.mark.parametrize("line", ["{", "[]", '{"text": "a"}', '{"prompt": 3}', '{"prompt": ""}'])
def test_a_row_without_prompt_is_named(tmp_path, line):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(TfserveError, match=r"p\.jsonl:2"):
        read_prompts(path, 1, seed=0)
    path.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(TfserveError, match=r"p\.jsonl:1.*not valid UTF-8"):
        read_prompts(path, 1, seed=0)


def test_missing_and_empty_files_are_errors(tmp_path):
    with pytest.raises(TfserveError, match=r"--dataset: cannot read .*none\.jsonl"):
        read_prompts(tmp_path / "none.jsonl", 1, seed=0)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(TfserveError, match="no rows"):
        read_prompts(tmp_path / "empty.jsonl", 1, seed=0)


def test_prompt_size_allows_for_the_template():
    size = PromptSize.from_two((8, 38), (40, 70))
    assert (size.fixed, size.per_word) == (30, 1)
    assert size.words_for(64) == 34
    with pytest.raises(TfserveError, match="30 tokens of its own"):
        size.words_for(30)


def test_a_server_that_cuts_prompts_is_noticed():
    with pytest.raises(TfserveError, match="miscounts"):
        PromptSize.from_two((8, 16), (40, 16))


def test_answers_are_as_long_as_their_reference_within_bounds():
    lengths = Lengths(160, (96, 256))
    rows = [PromptRow("a", ref_output_tokens=n) for n in (10, 120, 900, None)]
    assert [lengths.of(row) for row in rows] == [96, 120, 256, 160]
    assert Lengths(64).of(rows[2]) == 64
    assert lengths.of(PromptRow("a", max_tokens=7, ref_output_tokens=120)) == 7


@pytest.mark.parametrize("text", ["96", "256:96", "0:4", "a:b"])
def test_bounds_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match=r"needs .* 1 <= low <= high"):
        parse_clamp(text)


def test_a_mix_gives_every_rate_its_share_in_an_order_of_the_seed():
    mix = parse_rate_mix("8:0.4,16:0.35,read:0.25")
    rates = mixed_rates(mix, 20, seed=1)
    assert [rates.count(rate) for rate in (8.0, 16.0, "read")] == [8, 7, 5]
    assert rates == mixed_rates(mix, 20, seed=1) != mixed_rates(mix, 20, seed=2)
    assert len(mixed_rates(parse_rate_mix("1:0.3,2:0.3,3:0.4"), 7, seed=0)) == 7


@pytest.mark.parametrize("text", ["8:0.4", "8:0.4,16:0.7", "8", "quick:1", "8:-1,16:2", "0:1"])
def test_a_mix_that_does_not_add_up_is_refused(text):
    with pytest.raises(ValueError, match=r"shares must be|a rate must be"):
        parse_rate_mix(text)


def test_reading_rates_are_numbers_or_the_servers_names():
    assert [parse_rate(text) for text in ("7.5", "listen", "auto")] == [7.5, "listen", "auto"]
    for text in ("burst", "0", "inf", "-3"):
        with pytest.raises(ValueError, match=r"a rate must be a .*number above 0"):
            parse_rate(text)


def test_the_bundled_prompts_are_real_and_licensed():
    rows = read_rows(BUNDLED_PROMPTS)
    assert len(rows) == 500
    assert sum(row.ref_output_tokens is None for row in rows) == 80
    assert "Apache-2.0" in BUNDLED_PROMPTS.with_name("SOURCES.md").read_text()


def test_rows_survive_being_written(tmp_path):
    rows = [PromptRow("a", max_tokens=3), PromptRow("é", ref_output_tokens=5)]
    write_rows(tmp_path / "p.jsonl", rows)
    assert read_rows(tmp_path / "p.jsonl") == rows

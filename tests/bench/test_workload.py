from __future__ import annotations

import random

import pytest

from tfserve.bench.workload import PromptSize, arrival_times, parse_rate, random_prompt, read_prompts
from tfserve.errors import TfserveError


def test_infinite_rate_is_everything_at_once():
    assert arrival_times(parse_rate("burst"), 3, seed=1) == arrival_times(parse_rate("inf"), 3, seed=2) == [0.0] * 3


def test_poisson_arrivals_have_the_rate_and_repeat_with_the_seed():
    times = arrival_times(parse_rate("10"), 2001, seed=3)
    assert times == arrival_times(10.0, 2001, seed=3) != arrival_times(10.0, 2001, seed=4)
    assert times == sorted(times)
    assert times[0] == 0
    assert times[-1] / 2000 == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "fast"])
def test_a_rate_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"rate|convert"):
        parse_rate(text)


def test_random_prompts_have_the_asked_words_and_differ():
    rng = random.Random(0)
    prompts = [random_prompt(12, rng) for _ in range(20)]
    assert {len(prompt.split()) for prompt in prompts} == {12}
    assert len(set(prompts)) == 20


def test_file_rows_are_each_used_before_any_repeats(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b", "id": 1}\n{"prompt": "c"}\n')
    prompts = read_prompts(path, 7, seed=5)
    assert sorted(prompts[:3]) == sorted(prompts[3:6]) == ["a", "b", "c"]
    assert len(prompts) == 7


@pytest.mark.parametrize("line", ["{", "[]", '{"text": "a"}', '{"prompt": 3}', '{"prompt": ""}'])
def test_a_row_without_prompt_is_named(tmp_path, line):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(TfserveError, match=r"p\.jsonl:2"):
        read_prompts(path, 1, seed=0)


def test_missing_and_empty_files_are_errors(tmp_path):
    with pytest.raises(TfserveError, match="No such file"):
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

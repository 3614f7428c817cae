"""The pictures of a burst: the stored data, and the drawing."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.burst.kept_timelines import Stream, TimelineFile
from benchmarks.burst.plots import main, unread_s, waits
from tests.bench.test_burst import cell, scripted
from tests.bench.test_scoring import record
from tfserve.bench.scoring import served
from tfserve.engine.scheduling.qos import buffer_sizes

PNG = b"\x89PNG"


def test_a_kept_answer_is_the_record_to_a_millisecond():
    original = record([1.0004, 1.25, 1.25, 3.0], rate=10.0, sent=0.5)
    kept = Stream.of(original)
    assert kept.gaps_ms == [500, 250, 0, 1750]
    again, before = kept.served(), served(original)
    assert again.arrival_s == before.arrival_s
    assert again.token_s == pytest.approx(before.token_s, abs=5e-4)
    assert Stream.of(record([], rate=None)).served().token_s.shape == (0,)


def test_one_repeat_of_each_policy_is_kept(tmp_path):
    path = tmp_path / "deep" / "t.json"
    words = ("--policies", "fcfs,tokenflow", "--repeats", "2", "--timelines", str(path), "--timelines-repeat", "1")
    scripted(tmp_path, *words)
    cells = TimelineFile(path).read()
    assert sorted((kept.policy, kept.repeat) for kept in cells) == [("fcfs", 1), ("tokenflow", 1)]
    assert all(len(stream.gaps_ms) == 10 and stream.rate for kept in cells for stream in kept.streams)


def test_a_cell_measured_again_replaces_the_older_one(tmp_path):
    file = TimelineFile(tmp_path / "t.json")
    file.add("fcfs", 0, [record([1.0])])
    file.add("fcfs", 0, [record([2.0])])
    assert [kept.streams[0].gaps_ms for kept in file.read()] == [[2000]]


def test_what_is_unread_at_any_moment_is_what_was_unread_when_tokens_came():
    request = served(record([1.0, 1.02, 1.05, 1.9, 2.0, 2.01, 2.02], rate=10.0))
    at = unread_s(request, request.token_s)
    assert at * request.rate == pytest.approx(buffer_sizes(request)[0])


def test_a_reader_waits_then_reads_then_stalls_then_is_done():
    # Two tokens at once, half a second of silence, a third: 0.2 s of reading, 0.3 s of nothing, 0.1 s of reading.
    request = served(record([1.0, 1.0, 1.5], rate=10.0))
    at_s = np.array([0.9, 1.0, 1.15, 1.3, 1.55, 1.7])
    assert unread_s(request, at_s) == pytest.approx([np.nan, 0.2, 0.05, 0.0, 0.05, np.nan], nan_ok=True)
    assert waits(request, at_s).tolist() == [True, False, False, False, False, False]
    never = served(record([], rate=10.0))
    assert np.isnan(unread_s(never, at_s)).all()
    assert waits(never, at_s).all()


def test_all_pictures_are_drawn_from_the_result_files(tmp_path):
    pytest.importorskip("matplotlib")
    scripted(tmp_path, "--policies", "fcfs,tokenflow", "--repeats", "1", "--timelines", str(tmp_path / "t.json"))
    files = ["--results", str(tmp_path / "r.json"), "--timelines", str(tmp_path / "t.json")]
    main([*files, "--out", str(tmp_path / "images")])
    drawn = sorted((tmp_path / "images").iterdir())
    assert [path.name for path in drawn] == ["burst-buffers.png", "burst-summary.png", "burst-ttft.png"]
    assert all(path.read_bytes().startswith(PNG) for path in drawn)


def test_a_policy_without_timelines_is_named(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "r.json").write_text(json.dumps({"cells": [{"policy": "fcfs", "repeat": 0, **cell()}]}))
    with pytest.raises(SystemExit, match="has no fcfs, tokenflow"):
        main(["--results", str(tmp_path / "r.json"), "--timelines", str(tmp_path / "t.json"), "--out", str(tmp_path)])

from __future__ import annotations

import re
import sys

import pytest

from tests.bench.test_scoring import record
from tfserve.bench.plots import timelines, ttft_cdf
from tfserve.errors import TfserveError
from tfserve.install_hint import install_command

PNG = b"\x89PNG"


@pytest.mark.parametrize("draw", [ttft_cdf, timelines])
@pytest.mark.parametrize("rate", [None, 8.0])
def test_pictures_are_drawn_with_and_without_readers(draw, rate, tmp_path):
    pytest.importorskip("matplotlib")
    records = [record([1.0, 2.0, 3.0], rate=rate), record([], rate=rate, error="timeout")]
    draw(records, tmp_path / "deep" / "x.png")
    assert (tmp_path / "deep" / "x.png").read_bytes().startswith(PNG)


def test_nothing_to_draw_is_an_empty_picture(tmp_path):
    pytest.importorskip("matplotlib")
    ttft_cdf([], tmp_path / "x.png")
    timelines([record([], error="connect")], tmp_path / "y.png")
    assert (tmp_path / "x.png").read_bytes().startswith(PNG)
    assert (tmp_path / "y.png").read_bytes().startswith(PNG)


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(TfserveError, match=re.escape(install_command("bench"))):
        ttft_cdf([record([1.0])], tmp_path / "x.png")

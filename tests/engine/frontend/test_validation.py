"""Arguments of every make: what reaches the core is of Python's own types, or refused where it was given."""

from __future__ import annotations

from decimal import Decimal
from enum import StrEnum
from fractions import Fraction

import msgspec
import numpy as np
import pytest
import torch

from tests.scripted import scripted_engine, write_scripted_model
from tfserve.engine.frontend.validation import as_count, as_priority, as_rate
from tfserve.errors import RequestError
from tfserve.messages import AddRequest, ReportPlayed, ToCore
from tfserve.types import Place, SamplingParams


class Whole(int):
    """An integer that msgspec does not encode."""


@pytest.mark.parametrize("place", [*Place, None])
def test_where_a_text_begins_reaches_the_core(place):
    sent = AddRequest("a", [1], SamplingParams(), 0.0, begins_in=place)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=ToCore) == sent


class Named(StrEnum):
    READ = "read"


@pytest.mark.parametrize("rate", [8, 8.0, Whole(8), np.float32(8), np.int64(8), torch.tensor(8.0), np.array(8), "read"])
def test_a_rate_of_any_make_reaches_the_core_as_it_is_meant(rate):
    sent = AddRequest("a", [1], SamplingParams(), 0.0, as_rate(rate, 6.0))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=AddRequest).rate == rate
    assert type(as_rate(Named.READ, 6.0)) is str


@pytest.mark.parametrize(
    "rate", [True, np.True_, [8], {}, b"read", Decimal(8), Fraction(8), torch.ones(2), torch.eye(2).to_sparse(), "8"]
)
def test_what_is_no_rate_is_refused(rate):
    with pytest.raises(RequestError) as caught:
        as_rate(rate, 6.0)
    assert caught.value.param == "consumption_rate"


@pytest.mark.parametrize(
    ("given", "count"), [(3, 3), (np.int64(3), 3), (torch.tensor(3), 3), (-5, 0), (2**70, 2**63 - 1)], ids=repr
)
def test_counts_of_any_make_are_integers_that_can_be_sent(given, count):
    sent = ReportPlayed("a", as_count(given, "num_tokens"))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=ReportPlayed).num_tokens == count


@pytest.mark.parametrize("given", [np.int64(-3), Whole(-3), torch.tensor(-3)], ids=repr)
def test_a_priority_may_be_of_any_make(given):
    assert (as_priority(given), type(as_priority(given))) == (-3, int)


@pytest.mark.parametrize("given", [None, "3", 1.5, float("nan"), True, [3], 2.0], ids=repr)
async def test_a_report_that_is_no_count_is_refused_and_the_engine_goes_on(tmp_path, given):
    with scripted_engine(write_scripted_model(tmp_path), "a b ", ends=False) as engine:
        stream = engine.submit("Why?", SamplingParams(max_tokens=50))
        await stream.next()
        with pytest.raises(RequestError, match="num_tokens must be an integer"):
            stream.report_played(given)
        while not (await stream.next()).finished:
            pass
        engine.check_health()

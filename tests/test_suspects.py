"""`make test-newest` and `make test-oldest` name the package that broke each test."""

from __future__ import annotations

import json

import pytest

from tests import suspects
from tests.suspects import COLLECTION, blame, failed_tests, installed, read_lock, run_tests

NAMES = ("aiohttp", "msgspec", "numpy", "pytest")


class World:
    """Tests that fail for one package each, for none (they pass when repeated) or whatever is done."""

    def __init__(self, **causes):
        self.causes, self.trials = causes, []

    def still_failing(self, name):
        self.trials.append(name)
        return [test for test, cause in self.causes.items() if cause not in {"chance", name}]


def test_each_test_is_blamed_on_the_package_it_fails_for():
    world = World(a="numpy", b="numpy", c="aiohttp", d="chance", e="always")
    found = list(blame(world.causes, NAMES, world.still_failing))
    assert found == [(None, {"d"}), ("aiohttp", {"c"}), ("numpy", {"a", "b"})]
    assert world.trials == [None, *NAMES]


def test_the_search_ends_with_the_last_test():
    world = World(a="aiohttp", b="chance")
    assert list(blame(world.causes, NAMES, world.still_failing)) == [(None, {"b"}), ("aiohttp", {"a"})]
    assert world.trials == [None, "aiohttp"]


def test_the_package_is_put_back_before_the_next_one_is_tried(monkeypatch, capsys):
    moves = []
    lock, found = {"aiohttp": "2", "numpy": "2"}, {"aiohttp": "1", "numpy": "1", "six": "1"}
    monkeypatch.setattr(suspects, "move", lambda *move: moves.append(move))
    monkeypatch.setattr(suspects, "pip", lambda *words: None)
    monkeypatch.setattr(suspects, "run_tests", lambda tests: [] if moves[-1:] == [("six", None)] else tests)
    suspects.report(["tests/a.py::one"], sorted(found), lock, found)
    assert moves == [("aiohttp", "2"), ("aiohttp", "1"), ("numpy", "2"), ("numpy", "1"), ("six", None), ("six", "1")]
    assert "six 1 (lock: without it)\n    tests/a.py::one" in capsys.readouterr().out


def test_only_lines_for_this_python_count(tmp_path):
    lock = tmp_path / "lock.txt"
    lock.write_text(
        "# made by a tool\na==1.0   # via b\nB_c==2 ; python_full_version >= '3.11'\nd==1 ; python_version < '3'\n"
    )
    assert read_lock(lock) == {"a": "1.0", "b-c": "2"}
    assert installed()["pytest"] == pytest.__version__
    assert "torch" not in installed()


def test_failed_tests_are_taken_from_pytests_own_record(tmp_path):
    assert failed_tests(tmp_path) == [COLLECTION]
    record = tmp_path / "v" / "cache" / "lastfailed"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"tests/a.py::one": True, "tests/a.py::two": True}))
    assert failed_tests(tmp_path) == ["tests/a.py::one", "tests/a.py::two"]


def test_tests_are_repeated_and_failing_ones_are_named(tmp_path):
    (tmp_path / "test_it.py").write_text("def test_good(): pass\ndef test_bad(): assert False\n")
    good, bad = (f"{tmp_path}/test_it.py::test_{kind}" for kind in ("good", "bad"))
    assert run_tests([good]) == []
    assert run_tests([bad]) == [bad]

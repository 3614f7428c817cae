"""`make test-newest` and `make test-oldest` name the packages that broke the tests, and no others."""

from __future__ import annotations

import json

import pytest

from tests.suspects import culprits, failed_tests, installed, read_lock

NAMES = [f"package-{number}" for number in range(40)]


class World:
    """Tests that pass if every broken package is as in the lock, and no pair has only one that is."""

    def __init__(self, broken, pairs=()):
        self.broken, self.pairs, self.trials = set(broken), pairs, 0

    def passes(self, locked):
        self.trials += 1
        return self.broken <= set(locked) and all((a in locked) == (b in locked) for a, b in self.pairs)


@pytest.mark.parametrize(
    "broken", [["package-0"], ["package-39"], ["package-17"], ["package-3", "package-4"], ["package-0", "package-30"]]
)
def test_exactly_the_broken_packages_are_found(broken):
    world = World(broken)
    assert sorted(culprits(NAMES, world.passes)) == sorted(broken)
    assert world.trials < 12 * len(broken)


@pytest.mark.parametrize("broken", ["package-1", "package-30", "package-19"])
def test_packages_that_go_together_do_not_hide_the_broken_one(broken):
    pairs = [("package-19", "package-20"), ("package-9", "package-10")]
    together = {broken, *(other for pair in pairs if broken in pair for other in pair)}
    assert set(culprits(NAMES, World([broken], pairs).passes)) == together


def test_nothing_is_blamed_where_no_package_is_to_blame():
    assert culprits(NAMES, lambda locked: False) is None
    assert culprits(NAMES, lambda locked: True) == []


def test_only_lines_for_this_python_count(tmp_path):
    lock = tmp_path / "lock.txt"
    lock.write_text(
        "# made by a tool\na==1.0   # via b\nB_c==2 ; python_full_version >= '3.11'\nd==1 ; python_version < '3'\n"
    )
    assert read_lock(lock) == {"a": "1.0", "b-c": "2"}
    assert installed()["pytest"] == pytest.__version__


def test_failed_tests_are_taken_from_pytests_own_record(tmp_path):
    assert failed_tests(tmp_path) == ["--collect-only", "tests"]
    record = tmp_path / "v" / "cache" / "lastfailed"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"tests/a.py::one": True, "tests/a.py::two": True}))
    assert failed_tests(tmp_path) == ["tests/a.py::one", "tests/a.py::two"]

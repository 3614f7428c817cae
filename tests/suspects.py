"""Which package broke the tests: run by `make test-newest` and `make test-oldest` in their environment after a failure.

    python -m tests.suspects LOCK PYTEST_CACHE

Lists what differs from the lock. Then it installs versions of the lock until the tests that failed pass, and names the
fewest packages for which that is needed. The environment is of no use afterwards.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

MOST_TESTS = 20
"""Failed tests that are repeated: some of them fail for every package that broke any."""


def read_lock(path: Path) -> dict[str, str]:
    """Versions by package, of a lock's lines that count for this Python and system."""
    lines = (line.partition(" #")[0].strip() for line in path.read_text().splitlines())
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    exact = {canonicalize_name(each.name): each for each in wanted if each.marker is None or each.marker.evaluate()}
    return {name: str(each.specifier).removeprefix("==") for name, each in exact.items()}


def installed() -> dict[str, str]:
    """Versions by package, of this environment."""
    return {canonicalize_name(each.metadata["Name"]): each.version for each in distributions()}


def culprits(names: Sequence[str], passes: Callable[[Collection[str]], bool]) -> list[str] | None:
    """The fewest of `names` that must be of the lock for the tests to pass; None if all of them do not suffice.

    `passes` says whether the tests pass with those packages as in the lock and the others as they were. Found by
    bisection, one after another; a package that was found because a trial parted it from its partner is then dropped.
    """
    if not passes(names):
        return None
    needed: list[str] = []
    while not passes(needed):
        rest = [name for name in names if name not in needed]
        low, high = 0, len(rest)  # the tests fail with `rest[:low]` of the lock, and pass with `rest[:high]`
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if passes([*needed, *rest[:middle]]) else (middle, high)
        needed.append(rest[low])
    fewer = itertools.chain.from_iterable(itertools.combinations(needed, size) for size in range(1, len(needed)))
    return next((list(subset) for subset in fewer if passes(subset)), needed)


class Trial:
    """The failed tests, and the environment with some packages as in the lock."""

    def __init__(self, found: Mapping[str, str], lock: Mapping[str, str], tests: Sequence[str]) -> None:
        self._versions = {True: lock, False: found}
        self._now = dict(found)
        self._tests = tests
        self._seen: dict[frozenset[str], bool] = {}

    def passes(self, locked: Collection[str]) -> bool:
        """Whether the tests pass with `locked` as in the lock. Each answer is found once."""
        key = frozenset(locked)
        if key not in self._seen:
            self._install(key)
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *self._tests]
            self._seen[key] = subprocess.run(command, capture_output=True, check=False).returncode == 0
            print(f"  {len(key)} packages as in the lock: {'pass' if self._seen[key] else 'fail'}", flush=True)
        return self._seen[key]

    def _install(self, locked: Collection[str]) -> None:
        wanted = {name: self._versions[name in locked].get(name, version) for name, version in self._now.items()}
        changed = [f"{name}=={version}" for name, version in wanted.items() if version != self._now[name]]
        if changed:
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
            subprocess.run([*pip, "install", "--no-deps", *changed], check=True, stderr=subprocess.DEVNULL)
        self._now = wanted


def failed_tests(cache: Path) -> list[str]:
    """What failed in pytest's last run; the collection of all tests if it did not get so far."""
    record = cache / "v" / "cache" / "lastfailed"
    failed = list(json.loads(record.read_text())) if record.exists() else []
    return failed[:MOST_TESTS] or ["--collect-only", "tests"]


def main(lock_file: str, cache: str) -> None:
    """Print what differs from the lock, and what of it broke the tests."""
    lock, found = read_lock(Path(lock_file)), installed()
    differing = sorted(name for name in lock.keys() & found.keys() if lock[name] != found[name])
    print(f"\n{len(differing)} packages have another version than {lock_file}:")
    for name in differing:
        print(f"  {name}: {lock[name]} in the lock, {found[name]} here")
    print("Trying which of them the tests fail for:", flush=True)
    trial = Trial(found, lock, failed_tests(Path(cache)))
    broke = culprits(differing, trial.passes)
    if broke is None:
        print("The tests fail with the versions of the lock too: see `make test`.")
    elif not broke:
        print("The tests that failed pass when they are repeated: no package is to blame.")
    else:
        print("The tests fail for: " + ", ".join(f"{name} {found[name]} (lock: {lock[name]})" for name in broke))


if __name__ == "__main__":
    main(*sys.argv[1:])

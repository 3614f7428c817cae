"""Which package broke the tests: run by `make test-newest` and `make test-oldest` in their environment after a failure.

    python -m tests.suspects LOCK PYTEST_CACHE

Lists what differs from the lock. Then it repeats the tests that failed with one package after another as in the lock,
and says which tests pass with which. The environment is of no use afterwards.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NOT_TRIED = re.compile(r"pip|tfserve|torch|triton|(nvidia|cuda)-.*")
"""Packages that no lock has."""

MAX_TESTS = 20
"""Failed tests that are repeated: one package breaks many tests, seldom many packages one each."""

COLLECTION = "the collection of tests"


def read_lock(path: Path) -> dict[str, str]:
    """Versions by package, of a lock's lines that count for this Python and system."""
    lines = (line.partition(" #")[0].strip() for line in path.read_text().splitlines())
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    exact = {canonicalize_name(each.name): each for each in wanted if each.marker is None or each.marker.evaluate()}
    return {name: str(each.specifier).removeprefix("==") for name, each in exact.items()}


def installed() -> dict[str, str]:
    """Versions by package, of this environment, without packages that no lock has."""
    versions = {canonicalize_name(each.metadata["Name"]): each.version for each in distributions()}
    return {name: version for name, version in versions.items() if not NOT_TRIED.fullmatch(name)}


def blame(
    failed: Collection[str], names: Sequence[str], still_failing: Callable[[str | None], Collection[str]]
) -> Iterator[tuple[str | None, set[str]]]:
    """Packages with the tests that fail for each, as they are found; None first, for tests that fail for no package.

    `still_failing` says which tests fail with one package as in the lock, or with none (None). What is left over in
    the end fails for no single package.
    """
    left = set(failed)
    for name in (None, *names):
        if left and (passed := left - set(still_failing(name))):
            left -= passed
            yield name, passed


def failed_tests(cache: Path) -> list[str]:
    """The failed tests of pytest's last run; all tests if the collection failed."""
    record = cache / "v" / "cache" / "lastfailed"
    return list(json.loads(record.read_text())) if record.exists() else [COLLECTION]


def run_tests(tests: Sequence[str]) -> list[str]:
    """The tests of `tests` that fail now."""
    words = ["--collect-only", "tests"] if list(tests) == [COLLECTION] else tests
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "pytest", "-q", "-o", f"cache_dir={cache}", *words]
        done = subprocess.run(command, capture_output=True, check=False)
        failed = failed_tests(Path(cache)) if done.returncode else []
    return [test for test in tests if test in failed] or (list(tests) if failed else [])


def pip(command: str, option: str, *packages: str) -> None:
    """Run pip on packages, if there are any."""
    words = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", command, option, *packages]
    if packages:
        subprocess.run(words, check=True, stderr=subprocess.DEVNULL)


def move(name: str, version: str | None) -> None:
    """Install a version of a package alone; without a version, remove it."""
    if version:
        pip("install", "--no-deps", f"{name}=={version}")
    else:
        pip("uninstall", "--yes", name)


def main(lock_file: str, cache: str) -> None:
    """Print what differs from the lock, and what of it broke the tests."""
    lock, found = read_lock(Path(lock_file)), installed()
    differing = sorted(name for name in found if lock.get(name) != found[name])
    print(f"\n{len(differing)} packages are not as in {lock_file}:")
    for name in differing:
        print(f"  {name}: {lock.get(name, 'not')} in the lock, {found[name]} here")
    report(failed_tests(Path(cache)), differing, lock, found)


def report(failed: Sequence[str], differing: Sequence[str], lock: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Repeat failed tests with one package after another as in the lock, and print what that changes."""
    tests = failed[:MAX_TESTS]
    print(
        f"Repeating {len(tests)} of {len(failed)} failed tests with one of them at a time as in the lock:", flush=True
    )
    # Releases of the lock may need packages that these do not. Being there, they change nothing.
    pip("install", "--no-deps", *(f"{name}=={version}" for name, version in lock.items() if name not in found))

    def still_failing(name: str | None) -> list[str]:
        if name is None:
            return run_tests(tests)
        move(name, lock.get(name))
        failing = run_tests(tests)
        move(name, found[name])
        return failing

    left = set(tests)
    for name, passed in blame(tests, differing, still_failing):
        left -= passed
        cause = (
            f"{name} {found[name]} (lock: {lock.get(name, 'without it')})"
            if name
            else "no package: passed when repeated"
        )
        print(f"  {cause}", *(f"    {test}" for test in sorted(passed)), sep="\n", flush=True)
    if left:
        print("  no single package", *(f"    {test}" for test in sorted(left)), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

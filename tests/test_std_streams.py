"""A command with closed or broken standard streams works as far as possible and does not crash."""

from __future__ import annotations

import subprocess
import sys

import pytest

TFSERVE = (sys.executable, "-m", "tfserve.cli")


def run(command: str) -> subprocess.CompletedProcess[str]:
    """A shell command in which "$@" is tfserve."""
    words = ["bash", "-c", command, "bash", *TFSERVE]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("closing", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_command_whose_standard_streams_are_closed_ends_as_it_should(closing: str) -> None:
    ended = run(f'"$@" serve /nonexistent {closing}')
    assert ended.returncode == 2
    assert ended.stdout in ("", "Loading /nonexistent ...\n")
    assert "Traceback" not in ended.stderr
    if "2>&-" not in closing:
        assert ended.stderr.splitlines()[-1].startswith("tfserve: error: ")


def test_what_is_opened_gets_no_number_of_a_standard_stream() -> None:
    code = "import os, sys; from tfserve.std_streams import open_closed; open_closed(); sys.exit(os.dup(0) < 3)"
    assert run(f"'{sys.executable}' -c '{code}' <&- >&- 2>&-").returncode == 0


def test_a_command_with_a_closed_output_ends_without_a_traceback() -> None:
    ended = run(
        """
        "$1" -c 'import sys; from tfserve import cli
        cli._generate = lambda args: print("x" * 2**20) or 0
        sys.exit(cli.main(["generate", "demo", "hello"]))' | true
        exit "${PIPESTATUS[0]}"
    """.replace("\n        ", "\n")
    )
    assert ended.returncode == 1
    assert ended.stderr == ""

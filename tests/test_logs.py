"""Logging of commands on stderr: lines of text, or objects of JSON, from a level on."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from tfserve.logs import log_to_stderr

PROGRAM = r"""
import logging, sys
from tfserve.logs import log_to_stderr
log_to_stderr()
log_to_stderr({level!r}, {layout!r}, {process!r})
ours, other = logging.getLogger("tfserve.http.app"), logging.getLogger("somelibrary")
for log in (ours, other):
    for level in (logging.DEBUG, logging.INFO, logging.WARNING):
        log.log(level, "%s %s", log.name, logging.getLevelName(level))
try:
    raise ValueError("two\nlines \udcff")
except ValueError:
    ours.exception("failed")
"""


LIBRARY = ["somelibrary INFO", "somelibrary WARNING"]


def logged(level: str = "info", layout: str = "text", process: str = "") -> list[str]:
    code = PROGRAM.format(level=level, layout=layout, process=process)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stderr.splitlines()


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        ("debug", ["tfserve.http.app DEBUG", "tfserve.http.app INFO", "tfserve.http.app WARNING", *LIBRARY]),
        ("info", ["tfserve.http.app INFO", "tfserve.http.app WARNING", *LIBRARY]),
        ("warning", ["tfserve.http.app WARNING", "somelibrary WARNING"]),
        ("error", []),
    ],
)
def test_a_level_is_the_least_that_is_shown_and_libraries_say_no_more_than_info(level, shown):
    messages = [json.loads(line)["message"] for line in logged(level, "json")]
    assert messages[-1] == "failed"
    assert messages[:-1] == shown


def test_every_line_of_json_is_an_object_with_time_level_logger_and_process():
    first, *_, last = (json.loads(line) for line in logged(layout="json", process="engine"))
    assert first["time"].endswith("Z")
    assert (first["level"], first["logger"], first["process"]) == ("info", "tfserve.http.app", "engine")
    assert last["level"] == "error"
    assert "ValueError: two\nlines" in last["error"]


def test_a_line_of_text_has_time_level_process_and_message():
    assert logged(process="engine")[0].endswith(" INFO engine tfserve.http.app INFO")
    assert logged()[0].endswith(" INFO tfserve.http.app INFO")


def test_a_program_that_logs_its_own_way_goes_on_to():
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    assert handlers, "pytest has handlers of its own"
    log_to_stderr("debug", "json")
    assert (root.handlers, root.level) == (handlers, level)

"""Without Linux's own functions in any process, as on macOS, a server starts and serves."""

from __future__ import annotations

import json
import os
import urllib.request
from pathlib import Path

import pytest

from tests.serving import Server
from tests.tokenizers import write_tiny_tokenizer

ELSEWHERE = """
import os, pathlib, resource, socket

del os.sched_getaffinity, socket.TCP_INFO
set_limit, read_text = resource.setrlimit, pathlib.Path.read_text

def setrlimit(which, limits):
    if which in (resource.RLIMIT_AS, resource.RLIMIT_NOFILE):
        raise ValueError("current limit exceeds maximum limit")
    set_limit(which, limits)

def no_proc(path, *args, **kwargs):
    if str(path).startswith(("/proc/", "/sys/")):
        raise FileNotFoundError(path)
    return read_text(path, *args, **kwargs)

resource.setrlimit, pathlib.Path.read_text = setrlimit, no_proc
"""
"""Python runs it as every process begins (`sitecustomize`)."""


@pytest.fixture
def model_dir(tiny_llama3: Path) -> Path:
    return write_tiny_tokenizer(tiny_llama3)


def ask(server: Server, path: str, **body: object) -> object:
    request = urllib.request.Request(server.url + path, json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def test_a_server_starts_and_serves_without_what_only_linux_has(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(ELSEWHERE)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", str(Path.cwd()))])
    environ = {**os.environ, "PYTHONPATH": path}
    small = ("--kv-cache-gib", "0.05")
    with Server(model_dir, tmp_path / "log", *small, env=environ) as server:
        server.wait_until_ready()
        answer = ask(server, "/v1/completions", prompt="Hello", max_tokens=4)
        assert answer["usage"]["completion_tokens"] >= 1
        schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "boolean"}}}
        messages = [{"role": "user", "content": "Hello"}]
        ask(server, "/v1/chat/completions", messages=messages, max_tokens=4, response_format=schema)
        assert "is not limited to 2 GiB" in server.printed()

"""/tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

import pytest

from tests.http.conftest import Running, StartServer
from tests.http.fakes import BOS, MAX_LEN


async def ask(server: Running, path: str, **body: Any) -> tuple[int, Any]:
    async with server.post(path, body) as response:
        return response.status, await response.json()


async def test_a_prompt_has_special_tokens_unless_they_are_refused(start: StartServer) -> None:
    server = await start()
    whole = {"count": 3, "max_model_len": MAX_LEN, "tokens": [BOS, 97, 98], "token_strs": None}
    assert await ask(server, "/tokenize", prompt="ab", model="tiny") == (200, whole)
    _, bare = await ask(server, "/tokenize", prompt="aé", add_special_tokens=False, return_token_strs=True)
    assert bare["tokens"] == [97, 0xC3, 0xA9]
    assert bare["token_strs"] == ["a", "\ufffd", "\ufffd"]
    assert (await ask(server, "/tokenize", prompt=""))[1]["tokens"] == [BOS]


async def test_messages_are_what_a_chat_would_run(start: StartServer) -> None:
    server = await start()
    messages = [{"role": "user", "content": "Hi"}]
    _, reply = await ask(server, "/tokenize", messages=messages)
    async with server.post("/v1/chat/completions", {"messages": messages}) as response:
        assert response.status == 200
    assert reply["tokens"] == server.engine.live[0].prompt
    _, open_ended = await ask(server, "/tokenize", messages=messages, add_generation_prompt=False)
    assert bytes(open_ended["tokens"]) == b"<user>Hi"


async def test_detokenize_is_the_way_back(start: StartServer) -> None:
    server = await start()
    assert await ask(server, "/detokenize", tokens=[BOS, *"é!".encode()]) == (200, {"prompt": "<s>é!"})
    assert await ask(server, "/detokenize", tokens=[]) == (200, {"prompt": ""})


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/tokenize", {"prompt": 3}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "tool_choice": "required"}, 400, "tool_choice"),
        ("/tokenize", {"prompt": "a", "continue_final_message": True}, 400, "continue_final_message"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": [2**62]}, 400, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens[0]"),
    ],
)
async def test_bad_questions_name_the_field(start: StartServer, path: str, body: Any, status: int, param: str) -> None:
    server = await start()
    got, reply = await ask(server, path, **body)
    assert got == status
    assert reply["error"]["param"] == param

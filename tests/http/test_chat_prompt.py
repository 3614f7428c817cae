"""What a request may ask of the chat template: exactly these tokens, in a chat and from /tokenize."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from tests.http.conftest import Running, StartServer
from tests.http.test_tool_templates import TOOLS
from tests.http.tool_templates import LLAMA3, QWEN25
from tests.scripted import scripted_server, write_scripted_model
from tests.tokenizers import CHAT_TEMPLATE, write_tiny_tokenizer
from tfserve.model.text.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
PLAIN = "/v1/completions"

ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The sky is"}]
REFUSAL = {"type": "refusal", "refusal": "No."}
TRIMMING = "{% for m in messages %}[{{ m.role }}]\n\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
THINKING = """\
{%- for m in messages %}[{{ m.role }}{{ ':' + m.name if m.name }}]
{{- '<think>' + m.reasoning_content + '</think>' if m.reasoning_content }}{{ m.content }}{% endfor %}
{%- if enable_thinking is defined and not enable_thinking %}<no thoughts>{% endif %}
{%- if reasoning_effort %}<{{ reasoning_effort }}>{% endif %}"""


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def tokenizer_with(model_dir: Path, template: str, *, bos: bool = False) -> Path:
    """A directory with the tiny tokenizer and `template`; with `bos`, a prompt begins with it, as Llama's do."""
    write_tiny_tokenizer(model_dir)
    (model_dir / "chat_template.jinja").write_text(template)
    if bos:
        backend = Backend.from_file(str(model_dir / "tokenizer.json"))
        begin = "<|im_start|>"
        backend.post_processor = TemplateProcessing(f"{begin} $A", special_tokens=[(begin, backend.token_to_id(begin))])
        backend.save(str(model_dir / "tokenizer.json"))
    return model_dir


async def prompts(start: StartServer, model_dir: Path, **body: Any) -> tuple[Running, list[int]]:
    """The server, and the prompt of a chat, which is what /tokenize says of the same body."""
    server = await start()
    server.engine.tokenizer = Tokenizer.from_dir(model_dir)  # type: ignore[assignment]
    body = {"messages": ASK, **body}
    async with server.post(CHAT, body) as response:
        assert response.status == 200, await response.text()
    async with server.post("/tokenize", body) as response:
        told = await response.json()
        assert response.status == 200, told
    prompt = server.engine.live[-1].prompt
    assert told["tokens"] == prompt
    return server, prompt


@pytest.fixture(autouse=True)
def wide_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake engines take the tiny tokenizer's 512 tokens."""
    monkeypatch.setattr("tests.http.fakes.VOCAB", 512)
    monkeypatch.setattr("tests.http.fakes.MAX_LEN", 10_000)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, QWEN25, TRIMMING, LLAMA3.replace("strftime_now is", "nope is")])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"messages": [*ASK, assistant("blue")], "continue_final_message": True},
        {"messages": [*ASK, assistant("blue, ")], "continue_final_message": True, "add_generation_prompt": False},
        {"messages": [*ASK, assistant("  blue\n\n")], "continue_final_message": True},
        {"messages": ASK, "continue_final_message": True},
        {"messages": [*ASK, assistant("x"), *ASK[1:], assistant("x")], "continue_final_message": True},
    ],
)
async def test_prompts_equal_those_of_transformers(
    start: StartServer, tmp_path: Path, template: str, fields: dict[str, Any]
) -> None:
    path = tokenizer_with(tmp_path, template)
    _, prompt = await prompts(start, path, **fields)
    wish = {"add_generation_prompt": not fields.get("continue_final_message"), "messages": ASK, **fields}
    theirs = AutoTokenizer.from_pretrained(path)
    assert prompt == theirs.apply_chat_template(wish.pop("messages"), return_dict=False, **wish)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, TRIMMING])
async def test_an_empty_message_is_continued_where_its_text_would_begin(
    start: StartServer, tmp_path: Path, template: str
) -> None:
    path = tokenizer_with(tmp_path, template)
    server, prompt = await prompts(start, path, messages=[*ASK, assistant("")], continue_final_message=True)
    head = "[assistant]\n\n" if template == TRIMMING else "<|im_start|>assistant\n"
    assert server.engine.tokenizer.decode(prompt, False).endswith("The sky is<|im_end|>\n" + head)


async def test_parts_are_continued_as_their_text_is(start: StartServer, tmp_path: Path) -> None:
    path = tokenizer_with(tmp_path, QWEN25)
    parts = [{"type": "text", "text": "bl"}, {"type": "text", "text": "ue"}]
    asked = [*ASK, {"role": "assistant", "content": parts}]
    _, prompt = await prompts(start, path, messages=asked, continue_final_message=True)
    _, same = await prompts(start, path, messages=[*ASK, assistant("blue")], continue_final_message=True)
    assert prompt == same


@pytest.mark.parametrize(
    ("fields", "template", "param"),
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, QWEN25, "continue_final_message"),
        ({"continue_final_message": True}, "{{ messages[0].content }}", "continue_final_message"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, QWEN25, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": {"documents": []}}, QWEN25, "chat_template_kwargs.documents"),
        ({"chat_template_kwargs": {"messages": []}}, QWEN25, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"tools": []}}, QWEN25, "chat_template_kwargs.tools"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, QWEN25, "chat_template_kwargs.chat_template"),
        ({"chat_template_kwargs": {"self": 1}}, QWEN25, "chat_template_kwargs.self"),
        ({"chat_template_kwargs": []}, QWEN25, "chat_template_kwargs"),
        ({"tools": TOOLS}, CHAT_TEMPLATE, "tools"),
        ({"messages": [{**ASK[0], "refusal": "No."}]}, QWEN25, "messages[0].refusal"),
        ({"messages": [{**assistant("Yes."), "refusal": "No."}]}, QWEN25, "messages[0].refusal"),
        ({"messages": [{**ASK[0], "content": [REFUSAL]}]}, QWEN25, "messages[0].content[0]"),
    ],
)
async def test_what_the_template_cannot_do_is_a_400(
    start: StartServer, tmp_path: Path, fields: dict[str, Any], template: str, param: str
) -> None:
    server = await start()
    server.engine.tokenizer = Tokenizer.from_dir(tokenizer_with(tmp_path, template))  # type: ignore[assignment]
    for path in (CHAT, "/tokenize"):
        async with server.post(path, {"messages": ASK, **fields}) as response:
            assert (response.status, (await response.json())["error"]["param"]) == (400, param)
    assert not server.engine.live


@pytest.mark.parametrize("field", ["tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"])
async def test_a_plain_prompt_has_no_template(start: StartServer, field: str) -> None:
    server = await start()
    value = {"tools": TOOLS, "chat_template_kwargs": {"a": 1}}.get(field, True)
    async with server.post("/tokenize", {"prompt": "x", field: value}) as response:
        assert (response.status, (await response.json())["error"]["param"]) == (400, field)


@pytest.mark.parametrize("template", [QWEN25, LLAMA3])
async def test_tools_are_part_of_the_prompt(start: StartServer, tmp_path: Path, template: str) -> None:
    path = tokenizer_with(tmp_path, template)
    _, without = await prompts(start, path)
    server, shown = await prompts(start, path, tools=TOOLS)
    _, hidden = await prompts(start, path, tools=TOOLS, tool_choice="none")
    assert '"weather"' in server.engine.tokenizer.decode(shown)
    assert hidden == without


async def test_template_variables_reach_the_template(start: StartServer, tmp_path: Path) -> None:
    path = tokenizer_with(tmp_path, THINKING)

    async def end(**fields: Any) -> str:
        server, prompt = await prompts(start, path, **fields)
        return server.engine.tokenizer.decode(prompt).partition("The sky is")[2]

    assert await end() == ""
    assert await end(chat_template_kwargs={"enable_thinking": False}) == "<no thoughts>"
    assert await end(chat_template_kwargs={"enable_thinking": True, "unread": False, "other": None}) == ""
    assert await end(reasoning_effort="low") == "<low>"
    assert await end(reasoning_effort="low", chat_template_kwargs={"reasoning_effort": "high"}) == "<high>"


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ({"role": "user", "name": "Ann", "content": "Hi"}, "[user:Ann]Hi"),
        ({**assistant("Hi"), "reasoning_content": "Hm."}, "[assistant]<think>Hm.</think>Hi"),
        ({**assistant("Hi"), "reasoning": "Hm."}, "[assistant]<think>Hm.</think>Hi"),
        ({"role": "assistant", "content": None, "refusal": "No."}, "[assistant]No."),
        ({"role": "assistant", "content": [REFUSAL]}, "[assistant]No."),
    ],
)
async def test_all_of_a_message_reaches_the_template(
    start: StartServer, tmp_path: Path, message: Mapping[str, Any], shown: str
) -> None:
    path = tokenizer_with(tmp_path, THINKING)
    server, prompt = await prompts(start, path, messages=[message])
    assert server.engine.tokenizer.decode(prompt) == shown


async def test_a_templated_prompt_gets_no_second_beginning(start: StartServer, tmp_path: Path) -> None:
    path = tokenizer_with(tmp_path, CHAT_TEMPLATE, bos=True)
    server, chat = await prompts(start, path)
    _, doubled = await prompts(start, path, add_special_tokens=True)
    assert doubled == [chat[0], *chat]
    text = server.engine.tokenizer.decode(chat, False)
    for special, ids in ((False, chat), (None, doubled), (True, doubled)):
        for echo in (False, True):
            body = {"prompt": text, "add_special_tokens": special, "echo": echo}
            async with server.post(PLAIN, body) as response:
                assert response.status == 200
                answer = (await response.json())["choices"][0]["text"]
            assert server.engine.live[-1].prompt == ids
            assert answer.startswith(text) == echo


async def test_an_answer_goes_on_where_the_final_message_ends(tmp_path: Path) -> None:
    script = {"The sky is<|im_end|>\n<|im_start|>assistant\nbl": "ue."}
    body = {"messages": [*ASK, assistant("bl")], "continue_final_message": True, "max_tokens": 20}
    server = scripted_server(write_scripted_model(tmp_path), script)
    async with server as running, running.post(CHAT, body) as response:
        assert (await response.json())["choices"][0]["message"]["content"] == "ue."


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("fields", "text", "reason"),
    [
        ({"stop": "blue"}, "The sky is blue", "stop"),
        ({"stop": ["sky", "blue"]}, "The sky", "stop"),
        ({"stop_token_ids": [2], "skip_special_tokens": False}, "The sky is blue because<|im_end|>", "stop"),
        ({"stop_token_ids": [2]}, "The sky is blue because", "stop"),
        ({"skip_special_tokens": False}, "The sky is blue because<|im_end|>", "stop"),
    ],
)
async def test_what_ended_the_text_stays_in_it_if_asked_for(
    tmp_path: Path, streamed: bool, fields: dict[str, Any], text: str, reason: str
) -> None:
    body = {"messages": ASK, "max_tokens": 50, "include_stop_str_in_output": True, "stream": streamed, **fields}
    server = scripted_server(write_scripted_model(tmp_path), "The sky is blue because")
    async with server as running, running.post(CHAT, body) as response:
        assert response.status == 200
        raw = await response.text()
    if not streamed:
        choice = json.loads(raw)["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, reason)
        return
    events = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith("data: {")]
    choices = [event["choices"][0] for event in events]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == text
    assert choices[-1]["finish_reason"] == reason

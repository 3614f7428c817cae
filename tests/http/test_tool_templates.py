"""A conversation with tools, from a client's JSON to the text that models of each family were trained on."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from tests.http.tool_templates import LLAMA3, MISTRAL, QWEN3, QWEN25
from tfserve.errors import RequestError
from tfserve.http.messages import ChatMessage, conversation
from tfserve.http.tool_parsing import new_call_id, tool_call_parser
from tfserve.http.tools import Tool, ToolPlan
from tfserve.model.text.chat_template import ChatTemplate, ToolFormat

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Looks",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def call(city: str) -> dict[str, Any]:
    function = {"name": "weather", "arguments": f'{{"city": "{city}"}}'}
    return {"id": f"call_{city}", "type": "function", "function": function}


def chat(*cities: str) -> list[dict[str, Any]]:
    """A client's messages: the model has called once for each city, and been told."""
    told = [{"role": "tool", "tool_call_id": f"call_{city}", "content": f"{city}: sunny"} for city in cities]
    asked = {"role": "assistant", "content": None, "tool_calls": [call(city) for city in cities]}
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rain?"}, asked, *told]


def render(template: ChatTemplate, messages: list[dict[str, Any]]) -> str:
    turns = conversation(msgspec.convert(messages, list[ChatMessage]))
    plan = ToolPlan(msgspec.convert(TOOLS, list[Tool]), None, True, template.tool_format)
    return template.render(turns, True, tools=plan.for_template)


def test_a_qwen25_conversation_with_two_calls() -> None:
    template = ChatTemplate(QWEN25, {})
    assert template.tool_format is ToolFormat.HERMES
    text = render(template, chat("Rome", "Köln"))
    assert '<tools>\n{"type": "function", "function": {"name": "weather", "description": "Looks"' in text
    assert text.endswith(
        "<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant"
        '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
        '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nRome: sunny\n</tool_response>"
        "\n<tool_response>\nKöln: sunny\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_llama3_conversation_with_a_call() -> None:
    template = ChatTemplate(LLAMA3, {"bos_token": "<|begin_of_text|>"})
    assert template.tool_format is ToolFormat.LLAMA3
    text = render(template, chat("Köln"))
    assert text.startswith(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\nBe brief."
    )
    assert '        "name": "weather",\n' in text
    assert text.endswith(
        "Rain?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        '{"name": "weather", "parameters": {"city": "Köln"}}<|eot_id|>'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"Köln: sunny"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


ID = "a1B2c3D4e"


def mistral_chat() -> list[dict[str, Any]]:
    """A client's messages, with an id as Mistral's templates take it."""
    asked = {"role": "assistant", "content": None, "tool_calls": [{**call("Köln"), "id": ID}]}
    told = {"role": "tool", "tool_call_id": ID, "content": "sunny"}
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rain?"}, asked, told]


def test_a_mistral_conversation_with_a_call() -> None:
    template = ChatTemplate(MISTRAL, {"bos_token": "<s>", "eos_token": "</s>"})
    assert template.tool_format is ToolFormat.MISTRAL
    text = render(template, mistral_chat())
    assert text.startswith('<s>[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "weather"')
    assert text.endswith(
        '[INST] Rain?[/INST][TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Köln"}, "id": "a1B2c3D4e"}]</s>'
        '[TOOL_RESULTS] {"content": sunny, "call_id": "a1B2c3D4e"}[/TOOL_RESULTS]'
    )


def test_mistrals_rules_on_roles_and_ids_are_the_clients_error() -> None:
    template = ChatTemplate(MISTRAL, {"bos_token": "<s>", "eos_token": "</s>"})
    with pytest.raises(RequestError, match="The roles must alternate"):
        render(template, [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    with pytest.raises(RequestError, match="Ids of calls have 9 letters"):
        render(template, chat("Lisbon"))


def test_the_ids_of_calls_are_such_as_the_template_takes() -> None:
    template = ChatTemplate(MISTRAL, {"bos_token": "<s>", "eos_token": "</s>"})
    messages = mistral_chat()
    messages[2]["tool_calls"][0]["id"] = messages[3]["tool_call_id"] = new_call_id(template.tool_format)
    assert messages[3]["tool_call_id"] in render(template, messages)


def test_a_qwen3_conversation_shows_thoughts_of_the_last_turn_alone() -> None:
    template = ChatTemplate(QWEN3, {})
    assert template.tool_format is ToolFormat.HERMES
    assert template.thinks
    messages = chat("Rome")
    messages[2]["reasoning_content"] = "I look."
    text = render(template, messages)
    assert '<|im_start|>assistant\n<think>\nI look.\n</think>\n\n\n<tool_call>\n{"name": "weather"' in text
    assert text.endswith("<tool_response>\nRome: sunny\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
    later = [*messages, {"role": "assistant", "content": "Sunny."}, {"role": "user", "content": "And now?"}]
    assert "I look." not in render(template, later)
    turns = conversation(msgspec.convert(messages, list[ChatMessage]))
    quiet = template.render(turns, True, tools=None, enable_thinking=False)
    assert quiet.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_what_a_template_cannot_say_is_the_clients_error() -> None:
    template = ChatTemplate(LLAMA3, {"bos_token": ""})
    with pytest.raises(RequestError, match="One tool call at once!"):
        render(template, chat("Rome", "Köln"))
    with pytest.raises(RequestError, match="no first user message"):
        render(template, [{"role": "system", "content": "Be brief."}])


@pytest.mark.parametrize(
    ("source", "mark"),
    [
        (QWEN25, "<|im_start|>assistant"),
        (QWEN3, "<|im_start|>assistant"),
        (LLAMA3, "assistant<|end_header_id|>"),
        (MISTRAL, "[/INST]"),
    ],
)
def test_calls_as_the_template_writes_them_are_found(source: str, mark: str) -> None:
    template = ChatTemplate(source, {"bos_token": "", "eos_token": "</s>"})
    messages = json.loads(json.dumps(chat("Rome")).replace("call_Rome", ID))
    text = render(template, messages).split(mark)[1]
    for end in ("<|im_end|>", "<|eot_id|>", "</s>"):
        text = text.partition(end)[0]
    assert template.tool_format is not None
    parser = tool_call_parser(template.tool_format, {"weather"})
    parts = [*map(parser.push, text), parser.finish()]
    assert "".join(part.content for part in parts).strip() == ""
    assert [each for part in parts for each in part.calls] == [("weather", '{"city": "Rome"}')]

"""A conversation with tools, from a client's JSON to the text that models of both families were trained on."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.http.tool_templates import LLAMA3, QWEN25
from tfserve.errors import RequestError
from tfserve.http.messages import ChatMessage, conversation
from tfserve.http.tool_parsing import tool_call_parser
from tfserve.http.tools import Tool, ToolPlan
from tfserve.model.chat_template import ChatTemplate, ToolFormat

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


def test_what_a_template_cannot_say_is_the_clients_error() -> None:
    template = ChatTemplate(LLAMA3, {"bos_token": ""})
    with pytest.raises(RequestError, match="One tool call at once!"):
        render(template, chat("Rome", "Köln"))
    with pytest.raises(RequestError, match="no first user message"):
        render(template, [{"role": "system", "content": "Be brief."}])


@pytest.mark.parametrize(
    ("source", "mark"), [(QWEN25, "<|im_start|>assistant"), (LLAMA3, "assistant<|end_header_id|>")]
)
def test_calls_as_the_template_writes_them_are_found(source: str, mark: str) -> None:
    template = ChatTemplate(source, {"bos_token": ""})
    text = render(template, chat("Rome")).split(mark)[1].partition("<|im_end|>")[0].partition("<|eot_id|>")[0]
    assert template.tool_format is not None
    parser = tool_call_parser(template.tool_format, {"weather"})
    parts = [*map(parser.push, text), parser.finish()]
    assert "".join(part.content for part in parts).strip() == ""
    assert [each for part in parts for each in part.calls] == [("weather", '{"city": "Rome"}')]

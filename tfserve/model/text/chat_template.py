"""Chat templates: from messages to the prompt text the model was trained on. Torch-free.

The environment is the one Hugging Face documents for chat templates (transformers `utils/chat_template_utils.py`):
checkpoints carry templates written for it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.nodes
import jinja2.parser
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables

from tfserve import strict_json
from tfserve.errors import ModelError, RequestError, failures
from tfserve.model.loading.fields import Fields, is_absent, read_text
from tfserve.model.text.template_limits import LimitedEnvironment

TOOL_CALL_TAGS = ("<tool_call>", "</tool_call>")
"""Tags around each tool call in the Hermes format."""

MISTRAL_TAGS = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
"""Markers in Mistral's formats: before the tool calls, before the id of a call, before its arguments."""

THOUGHT_TAGS = ("<think>", "</think>")
"""Tags around the reasoning before the answer (Qwen3, DeepSeek-R1)."""


class ToolFormat(enum.Enum):
    """Format of tool calls: <tool_call> tags (Hermes, Qwen), bare JSON (Llama 3), or after [TOOL_CALLS] (Mistral)."""

    HERMES = "hermes"
    LLAMA3 = "llama3"
    MISTRAL = "mistral"


class ChatTemplate:
    """One compiled template, with the model's special tokens (`bos_token`, ...) in its scope.

    `source` is its text. `tool_format` is how the template tells the model to call tools; None if it shows no tools.
    `thinks`: it separates reasoning from answers. `variables` are the names that it reads. Raises ModelError if
    `source` is not a valid template, or takes too long to compile.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        try:
            self._environment = _environment()
            self._template = self._environment.from_string(source)
            self.variables = frozenset(find_undeclared_variables(self._environment.parse(source)))
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"chat template, line {error.lineno}: {error.message}; correct it or remove it") from None
        except failures() as error:  # jinja2 compiles a template to Python, which has its own limits
            raise ModelError(f"chat template: cannot be compiled ({error}); correct it or remove it") from None
        self.source = source
        self._special_tokens = dict(special_tokens)
        self.tool_format = _tool_format(source)
        self.thinks = THOUGHT_TAGS[1] in source

    @property
    def answer_tags(self) -> frozenset[str]:
        """Tags that separate parts of answers. They count as text, even if the tokenizer calls them special."""
        of_calls = {ToolFormat.HERMES: TOOL_CALL_TAGS, ToolFormat.MISTRAL: MISTRAL_TAGS}
        calls: tuple[str, ...] = () if self.tool_format is None else of_calls.get(self.tool_format, ())
        return frozenset(calls + (THOUGHT_TAGS if self.thinks else ()))

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, **kwargs: Any) -> str:
        """The prompt text. Content given as text parts is joined by newlines.

        Raises RequestError for other content parts, and for conversations that the template rejects or that exceed the
        limits of template_limits.py.
        """
        scope = {"tools": None, "documents": None, **self._special_tokens, **kwargs}
        chat = [_flatten(message, index) for index, message in enumerate(messages)]
        try:
            self._environment.restart()
            return self._template.render(messages=chat, add_generation_prompt=add_generation_prompt, **scope)
        except failures() as error:  # a template is a program and may raise anything
            raise RequestError("messages", f"the model's chat template rejected the messages: {error}") from None


def read_chat_template(model_dir: Path, config: Fields) -> tuple[str, str] | None:
    """A checkpoint's template and its file: chat_template.jinja, else `chat_template` of `config`, else None.

    `config` is its tokenizer_config.json; of a list of templates the one named "default" is used. Raises ModelError if
    the template is not text.
    """
    path = model_dir / "chat_template.jinja"
    if not is_absent(path):
        return read_text(path), str(path)
    stored = config.value("chat_template")
    if isinstance(stored, list):
        named = [Fields(entry, config.source, "chat_template.") for entry in stored if isinstance(entry, Mapping)]
        if len(named) < len(stored):
            raise config.wrong("chat_template", 'text or a list of {"name": ..., "template": ...}')
        texts = {entry.text("name"): entry.text("template") for entry in named}
        text = texts.get("default")
    else:
        text = config.text("chat_template") if stored is not None else None
    return None if text is None else (text, f"{config.source}: chat_template")


def _tool_format(source: str) -> ToolFormat | None:
    """The format that the template's own instructions name."""
    if "tools" not in source:
        return None
    if TOOL_CALL_TAGS[0] in source:
        return ToolFormat.HERMES
    if MISTRAL_TAGS[0] in source:
        return ToolFormat.MISTRAL
    return ToolFormat.LLAMA3 if "ipython" in source else None


def _flatten(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise RequestError("messages", f"messages[{index}].content: this model reads text parts only, got {kind!r}")
    return {**message, "content": "\n".join(part["text"] for part in content)}


def _environment() -> LimitedEnvironment:
    environment = LimitedEnvironment([_GenerationTag, loopcontrols])
    # JSON as in the models' training data; jinja2's own filter escapes HTML.
    environment.add_filter("tojson", strict_json.dumps)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


class _GenerationTag(Extension):
    """`{% generation %}`: marks the assistant's text for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own way to declare tags

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=lineno)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def strftime_now(layout: str) -> str:
    """The current time by strftime: templates put it into system messages."""
    return datetime.now().strftime(layout)

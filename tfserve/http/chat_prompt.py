"""From the messages of a chat to the prompt text: what a request may ask of the model's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Protocol

from tfserve.errors import RequestError
from tfserve.http.documented import documented
from tfserve.http.messages import ChatMessage, conversation
from tfserve.model.text.tokenizer import Tokenizer

_OWN_FIELDS = frozenset(
    {"messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "self"}
)
"""Names that `chat_template_kwargs` must not give a second meaning."""

_OPEN_END = "\ue000to be continued\ue000 "
"""Marks where the text of the final message ends. The space shows whether the template trims."""


TemplateVariables = Annotated[dict[str, Any], documented(description="Variables that the model's chat template reads.")]


class TemplateFields(Protocol):
    """The fields of a body that say how a conversation becomes a prompt."""

    add_generation_prompt: bool | None
    continue_final_message: bool | None
    chat_template_kwargs: dict[str, Any] | None
    reasoning_effort: str | None


def chat_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[ChatMessage],
    fields: TemplateFields,
    tools: Sequence[Mapping[str, Any]] | None,
) -> str:
    """The prompt text of `messages`; `tools` are what the template shows. Raises RequestError naming the field."""
    turns = conversation(messages)
    variables = {"tools": tools, **_variables(fields, tokenizer.template_variables)}
    if not fields.continue_final_message:
        begin = fields.add_generation_prompt is not False
        return tokenizer.apply_chat_template(turns, add_generation_prompt=begin, **variables)
    if fields.add_generation_prompt:
        message = "continue_final_message cannot be had with add_generation_prompt, which begins a new message"
        raise RequestError("continue_final_message", message)
    return _open_ended(tokenizer, turns, variables)


def _variables(fields: TemplateFields, known: frozenset[str]) -> dict[str, Any]:
    """What goes to the template beside the conversation. To a template, a variable that is not there is false."""
    variables: dict[str, Any] = {}
    if fields.reasoning_effort is not None and "reasoning_effort" in known:
        variables["reasoning_effort"] = fields.reasoning_effort
    for name, value in (fields.chat_template_kwargs or {}).items():
        shown = name[:100]
        where = f"chat_template_kwargs.{shown}"
        if name in _OWN_FIELDS:
            raise RequestError(
                where, f"{where} is no variable for the template; send {shown} as a field of the request"
            )
        if name in known:
            variables[name] = value
        elif value is not None and value is not False:
            raise RequestError(where, f"{where}: this model's chat template does not read {shown}; remove it")
    return variables


def _open_ended(tokenizer: Tokenizer, turns: Sequence[dict[str, Any]], variables: Mapping[str, Any]) -> str:
    """The prompt up to the end of the last turn's text, as transformers cuts it: trimmed if the template trims."""
    content = turns[-1]["content"]
    if turns[-1].get("tool_calls"):
        message = "continue_final_message: the final message calls tools; only its text could be continued"
        raise RequestError("continue_final_message", message)
    marked = [*turns[:-1], {**turns[-1], "content": content + _OPEN_END}]
    text = tokenizer.apply_chat_template(marked, add_generation_prompt=False, **variables)
    end = text.rfind(_OPEN_END.rstrip())
    if end < 0:
        message = "continue_final_message: this model's chat template does not show the final message as it is"
        raise RequestError("continue_final_message", message)
    is_trimmed = not text.startswith(_OPEN_END, end) and bool(content.strip())
    space = content[len(content.rstrip()) :]
    # Slices from its beginning: what the template's text knows of itself stays with them.
    return text[: end - len(space)] if is_trimmed and text.endswith(space, 0, end) else text[:end]

"""Tools: what clients define, what the chat template is given, and the grammar that makes the model call one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from tfserve.errors import RequestError
from tfserve.http.documented import documented
from tfserve.http.off_loop import schema_off_loop
from tfserve.model.grammars.grammar import check_grammar_beside, json_schema_grammar, lark_json
from tfserve.model.grammars.schema_limits import MAX_SCHEMA_CHARS, check_schema
from tfserve.model.text.chat_template import ToolFormat
from tfserve.types import Tenant

MAX_TOOLS = 128
"""Most tools of one request (OpenAI's limit)."""


MAX_PARAMETERS_BYTES = 4 * MAX_SCHEMA_CHARS
"""Longest parameters of all tools of one request together, as JSON."""


class FunctionDefinition(msgspec.Struct, kw_only=True):
    """A function that the model may call; `parameters` is a JSON schema."""

    # msgspec searches, and "$" is also before a newline at the end.
    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$(?!\n)")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True):
    """One entry of `tools`."""

    type: Literal["function"]
    function: FunctionDefinition

    def for_template(self) -> dict[str, Any]:
        """The definition as chat templates print it."""
        function = self.function
        description = {} if function.description is None else {"description": function.description}
        parameters = {"type": "object", "properties": {}} if function.parameters is None else function.parameters
        return {"type": "function", "function": {"name": function.name, **description, "parameters": parameters}}


class NamedFunction(msgspec.Struct, kw_only=True):
    """The function of a NamedToolChoice."""

    name: str


class NamedToolChoice(msgspec.Struct, kw_only=True):
    """`tool_choice` that makes the model call one certain function."""

    type: Literal["function"]
    function: NamedFunction


Tools = Annotated[list[Tool], documented(maxItems=MAX_TOOLS)]

ToolChoice = Annotated[str, documented(enum=["none", "auto", "required"])] | NamedToolChoice | None


class ToolPlan:
    """What one request wants of tools: nothing, calls if the model likes, or a call of `forced`.

    Raises RequestError for a choice that makes no sense, for parameters that are no object's, and for a model whose
    chat template shows no tools.
    """

    def __init__(
        self,
        tools: Sequence[Tool] | None,
        choice: ToolChoice,
        parallel: bool,
        format: ToolFormat | None,
    ) -> None:
        tools = tools or ()
        if len(tools) > MAX_TOOLS:
            raise RequestError("tools", f"at most {MAX_TOOLS} tools, got {len(tools)}")
        for place, tool in enumerate(tools):
            _check_parameters(tool.function.parameters, _name_parameters(place))
        self._tools = tools
        self.forced = _forced(tools, choice)
        self.format = None if choice == "none" or not tools else format
        self.parallel = parallel
        if tools and choice != "none" and format is None:
            message = "this model's chat template shows no tools (or not in a way known here); remove tools"
            raise RequestError("tools", message, "unsupported_parameter")

    @property
    def names(self) -> frozenset[str]:
        """The functions that may be called."""
        return frozenset(tool.function.name for tool in self._tools)

    @property
    def for_template(self) -> list[dict[str, Any]] | None:
        """What the chat template shows the model; None where it is not to call any."""
        return None if self.format is None else [tool.for_template() for tool in self._tools]

    async def grammar(self, tenant: Tenant) -> str | None:
        """A Lark grammar (llguidance's dialect) of the calls that must come, checked; None where the model is free.

        Raises RequestError, about the parameters at fault where they are one tool's, unless calls can be forced, and
        QueueFullError.
        """
        if not self.forced or self.format is None:
            return None
        # In a thread: large schemas are walked through, and the streams go on.
        grammars = await schema_off_loop(self._grammars)
        for grammar, param in grammars:
            await check_grammar_beside(grammar, param, tenant.name)
        return grammars[-1][0]

    async def measure(self) -> None:
        """Raise RequestError for parameters that are no schema of ordinary size, whether they are forced or shown."""
        if self._tools:
            await schema_off_loop(self._measure)

    def _measure(self) -> None:
        size = 0
        for place, tool in enumerate(self._tools):
            size += check_schema(tool.function.parameters or {}, _name_parameters(place))
            if size > MAX_PARAMETERS_BYTES:
                message = f"tools: their parameters are too long together; the limit is {MAX_PARAMETERS_BYTES} bytes"
                raise RequestError("tools", message)

    def _grammars(self) -> list[tuple[str, str]]:
        """What is to be checked, with the field that is at fault: each forced function by itself, then the whole."""
        parts = []
        for place, function in self.forced:
            name = _name_parameters(place)
            parts.append((json_schema_grammar(_arguments(function), name), name))
        return [*parts, (self._whole(), "tools")]

    def _whole(self) -> str:
        """The grammar of all calls that must come."""
        lines = []
        for number, (place, function) in enumerate(self.forced):
            begin = f'{{"name": {json.dumps(function.name)}, "{_ARGUMENTS[self.format]}": '
            # A schema of its own for each function, so that "#/$defs" is each one's own.
            lines.append(f"call_{number}: {json.dumps(begin)} args_{number} {json.dumps('}')}")
            lines.append(f"args_{number}: {lark_json(_arguments(function), _name_parameters(place))}")
        call = " | ".join(f"call_{number}" for number in range(len(self.forced)))
        if self.format is ToolFormat.LLAMA3:
            start = "start: call"
        elif self.format is ToolFormat.MISTRAL:
            start = 'start: "[" call ' + ('(", " call)* ' if self.parallel else "") + '"]"'
        else:
            start = r'start: "<tool_call>\n" call "\n</tool_call>"'
            if self.parallel:
                start += r' ("\n<tool_call>\n" call "\n</tool_call>")*'
        return "\n".join([start, f"call: {call}", *lines])


_ARGUMENTS: dict[ToolFormat | None, str] = {
    ToolFormat.HERMES: "arguments",
    ToolFormat.LLAMA3: "parameters",
    ToolFormat.MISTRAL: "arguments",
}
"""What each format calls a call's arguments."""


def _name_parameters(place: int) -> str:
    """The field that holds the parameters of the tool at this place."""
    return f"tools[{place}].function.parameters"


def _check_parameters(parameters: dict[str, Any] | None, name: str) -> None:
    """Raise RequestError about the field `name` for the schema of anything but an object."""
    kind = (parameters or {}).get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        shown = f"{kind:.64}" if isinstance(kind, str) else "another"
        message = f"{name} must be the schema of an object, as a call's arguments are; its type is {shown}"
        raise RequestError(name, message, "invalid_function_parameters")


def _arguments(function: FunctionDefinition) -> dict[str, Any]:
    """The schema of a call's arguments: always an object, where `parameters` leaves room for more."""
    return {**(function.parameters or {}), "type": "object"}


def _forced(tools: Sequence[Tool], choice: ToolChoice) -> list[tuple[int, FunctionDefinition]]:
    """The functions of which one must be called, with their places in `tools`; empty if the model is free."""
    match choice:
        case None | "none" | "auto":
            return []
        case "required":
            if not tools:
                raise RequestError("tool_choice", "tool_choice is 'required', but there are no tools")
            return [(place, tool.function) for place, tool in enumerate(tools)]
        case NamedToolChoice():
            name = choice.function.name
            named = [(place, tool.function) for place, tool in enumerate(tools) if tool.function.name == name]
            if not named:
                raise RequestError("tool_choice", f"tool_choice names {name[:100]!r}, which is not in tools")
            return named[:1]
        case _:
            wishes = "none, auto, required or {'type': 'function', 'function': {'name': ...}}"
            raise RequestError("tool_choice", f"tool_choice must be {wishes}, got {choice[:100]!r}")

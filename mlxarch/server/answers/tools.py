"""Tools that a request offers, in the same form for all APIs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from mlxarch.server.http.errors import invalid
from mlxarch.tokenizer.tokenizer import Tokenizer
from mlxarch.tool_calls.tool import ToolChoice
from mlxarch.tool_calls.use import ToolUse


@dataclass(frozen=True)
class ToolOptions:
    """Tools that a request offers.

    Attributes:
        definitions: definitions as in chat completions.
        choice: "auto", "none", "required", or the name of the tool to call.
        parallel: whether an answer may hold several calls.
    """

    definitions: Sequence[Mapping[str, Any]] = ()
    choice: ToolChoice = "auto"
    parallel: bool = True

    def use(self, tokenizer: Tokenizer) -> ToolUse | None:
        """Use of the tools by a model; None where none may be called.

        Raises:
            ApiError: a definition or the choice is of the wrong form.
        """
        if self.choice == "none":
            return None
        try:
            return ToolUse.of(tokenizer, self.definitions, self.choice, self.parallel)
        except ValueError as error:
            raise invalid(str(error), "tools") from None


INPUT = "input"
"""Parameter of the function that stands for a tool whose input is text."""


def custom_definition(tool: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Function of one text in place of a tool whose input is text.

    A regular expression becomes the pattern of the text. A grammar in Lark holds it as well, and the
    model is told of it.

    Args:
        tool: name, description and format of the tool.
        place: path of the tool in the request.

    Raises:
        ApiError: the format is of the wrong form.
    """
    form = tool.get("format") or {"type": "text"}
    if not isinstance(form, Mapping) or form.get("type") not in ("text", "grammar"):
        raise invalid(f"{place}.format.type is text or grammar", f"{place}.format.type")
    grammar = form.get("grammar", form)
    text: dict[str, Any] = {"type": "string"}
    description = str(tool.get("description") or "")
    lark: str | None = None
    if form["type"] == "grammar":
        syntax = grammar.get("syntax") if isinstance(grammar, Mapping) else None
        definition = grammar.get("definition") if isinstance(grammar, Mapping) else None
        if syntax not in ("lark", "regex") or not isinstance(definition, str):
            where = f"{place}.format"
            raise invalid(f"{where} needs a syntax, lark or regex, and a definition", where)
        if syntax == "regex":
            text["pattern"] = f"^(?:{definition})$"
        else:
            description += f"\n\nThe input follows this grammar (Lark):\n{definition}"
            lark = definition
    parameters = {"type": "object", "properties": {INPUT: text}, "required": [INPUT]}
    function = {
        "name": tool.get("name"),
        "description": description.strip(),
        "parameters": parameters,
        "strict": "pattern" in text,
    }
    if lark is not None:
        function["text_grammar"] = lark
    return {"type": "function", "function": function}


def input_of(arguments: str) -> str:
    """Input of a call of such a tool, from the arguments of the function in its place."""
    try:
        value = msgspec.json.decode(arguments or "{}")
    except msgspec.MsgspecError:
        return arguments
    text = value.get(INPUT) if isinstance(value, dict) else None
    return text if isinstance(text, str) else arguments


def arguments_of(text: str) -> str:
    """Arguments of the function in place of such a tool, from the input of a call."""
    return msgspec.json.encode({INPUT: text}).decode()


def chosen(
    definitions: Sequence[Mapping[str, Any]] | None,
    choice: object,
    parallel: bool | None,
    names: Mapping[str, str],
) -> ToolOptions:
    """Tools of a request of OpenAI's APIs.

    Args:
        definitions: definitions in the form of chat completions.
        choice: "auto", "none", "required", or an object that names one tool or several.
        parallel: whether an answer may hold several calls; None allows it.
        names: kind of a choice's object -> its field with the details; "" where they are its own.

    Raises:
        ApiError: the choice is of the wrong form.
    """
    offered = list(definitions or ())
    several = parallel is not False
    if choice is None:
        return ToolOptions(offered, "auto", several)
    if isinstance(choice, str):
        if choice not in ("auto", "none", "required"):
            raise invalid("tool_choice is auto, none, required or an object", "tool_choice")
        return ToolOptions(offered, choice, several)
    kind = str(choice.get("type")) if isinstance(choice, dict) else ""
    if not isinstance(choice, dict) or kind not in names:
        raise invalid(f"tool_choice.type must be one of {', '.join(names)}", "tool_choice.type")
    details = choice.get(names[kind]) if names[kind] else choice
    if not isinstance(details, dict):
        raise invalid(f"tool_choice.{names[kind]} is missing", f"tool_choice.{names[kind]}")
    if kind in ("function", "custom"):
        name = details.get("name")
        if name not in [_name(each) for each in offered]:
            raise invalid(f"tool_choice names {name!r:.80}, which is not offered", "tool_choice")
        return ToolOptions(offered, str(name), several)
    allowed = details.get("tools")
    if not isinstance(allowed, list):
        raise invalid("tool_choice has no list of tools", "tool_choice")
    listed = [_name(each) for each in allowed if isinstance(each, dict)]
    kept = [each for each in offered if _name(each) in listed]
    mode = details.get("mode", "auto")
    if not kept or mode not in ("auto", "required"):
        raise invalid("tool_choice.allowed_tools names no tool, or a wrong mode", "tool_choice")
    return ToolOptions(kept, str(mode), several)


def _name(definition: Mapping[str, Any]) -> object:
    function = definition.get("function", definition)
    return function.get("name") if isinstance(function, Mapping) else None

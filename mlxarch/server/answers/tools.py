"""Tools that a request offers, in the same form for all APIs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    if kind == "function":
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

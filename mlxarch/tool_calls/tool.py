"""Functions that a model may call, from JSON schemas and from Python functions."""

import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from mlxarch.errors import InvalidInput

_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
_PARAMETER = re.compile(r"^\s*:?(?:param\s+)?\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(\S.*)$")
_SECTION = re.compile(r"^\s*(Returns?|Raises|Yields|Examples?|Notes?)\s*:?\s*$")

ToolChoice = str
"""How many functions are called: "auto", "none", "required", or the name of one to call."""


@dataclass(frozen=True)
class Tool:
    """Function that a model may call.

    Attributes:
        name: name of the function: letters, digits, and the characters "_", "-" and ".".
        description: what it does, for the model.
        parameters: JSON schema of its arguments, an object.
        strict: refuse a schema with keywords that cannot be held while the model writes.
        function: the Python function, if the tool was made from one.
        text_grammar: grammar in Lark of the only argument, a text; None if the schema says it all.

    Raises:
        InvalidInput: a name or a schema is of the wrong form.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False
    function: Callable[..., Any] | None = None
    text_grammar: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise InvalidInput(
                "the name of a tool has 1 to 64 letters, digits or the characters _ - . ; "
                f"found {self.name!r:.100}"
            )
        if not isinstance(self.parameters, Mapping):
            raise InvalidInput(
                f"parameters of the tool {self.name} must be a JSON schema, found "
                f"{type(self.parameters).__name__}"
            )
        if self.parameters.get("type", "object") != "object":
            raise InvalidInput(
                f"parameters of the tool {self.name} must be of type object, found "
                f"{self.parameters['type']!r:.100}"
            )

    @property
    def schema(self) -> dict[str, Any]:
        """Schema of the arguments, closed: other arguments than those named are not allowed."""
        given = dict(self.parameters)
        if (
            not {"additionalProperties", "patternProperties", "$ref", "anyOf", "allOf", "oneOf"}
            & given.keys()
        ):
            given["additionalProperties"] = False
        return {"type": "object", "properties": {}} | given

    @property
    def definition(self) -> dict[str, Any]:
        """The tool as chat templates read it."""
        parameters = {"type": "object", "properties": {}} | dict(self.parameters)
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


def tool_of(given: Any) -> Tool:
    """Return a tool for what a caller gave.

    Args:
        given: a ``Tool``; a definition as in the OpenAI API, with or without its outer object; or a
            Python function with annotated parameters, whose docstring describes it.

    Raises:
        InvalidInput: none of these, or a function whose signature has no schema.
    """
    if isinstance(given, Tool):
        return given
    if isinstance(given, Mapping):
        function = given.get("function", given)
        if given.get("type", "function") != "function" or not isinstance(function, Mapping):
            raise InvalidInput(f"a tool must be of type function, found {given!r:.200}")
        if "name" not in function:
            raise InvalidInput(f"a tool must have a name, found {given!r:.200}")
        return Tool(
            function["name"],
            function.get("description") or "",
            function.get("parameters") or {},
            bool(function.get("strict")),
            text_grammar=function.get("text_grammar"),
        )
    if callable(given):
        return _tool_of_function(given)
    raise InvalidInput(
        f"a tool is a function, a definition (a dict) or a Tool, found {type(given).__name__}"
    )


def tools_of(given: Sequence[Any] | None) -> tuple[Tool, ...]:
    """Return tools for a list; their names must differ.

    Raises:
        InvalidInput: no list, a name that occurs twice, or an entry of the wrong form.
    """
    if given is not None and (isinstance(given, str | Mapping) or not isinstance(given, Sequence)):
        raise InvalidInput(f"tools must be a list, found {type(given).__name__}")
    tools = tuple(map(tool_of, given or ()))
    names = [tool.name for tool in tools]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidInput(f"two tools have the name {twice[0]}; names must differ")
    return tools


def _tool_of_function(function: Callable[..., Any]) -> Tool:
    name = getattr(function, "__name__", type(function).__name__)
    try:
        hints = typing.get_type_hints(function, include_extras=True)
        signature = inspect.signature(function)
    except (TypeError, ValueError, NameError) as problem:
        raise InvalidInput(f"the signature of {name} cannot be read: {problem}") from None
    description, texts = _read_docstring(inspect.getdoc(function) or "")
    properties: dict[str, Any] = {}
    required: list[str] = []
    definitions: dict[str, Any] = {}
    for parameter in signature.parameters.values():
        if parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
            parameter.POSITIONAL_ONLY,
        ):
            raise InvalidInput(
                f"{name} has the parameter {parameter}; a model gives arguments by name only"
            )
        if parameter.name not in hints:
            raise InvalidInput(f"the parameter {parameter.name} of {name} has no annotation")
        schema = _schema_of_type(hints[parameter.name], f"{name}({parameter.name})", definitions)
        if parameter.name in texts:
            schema = {"description": texts[parameter.name]} | schema
        if parameter.default is parameter.empty:
            required.append(parameter.name)
        properties[parameter.name] = schema
    parameters = {"type": "object", "properties": properties, "required": required}
    if definitions:
        parameters["$defs"] = definitions
    return Tool(name, description, parameters, function=function)


def _schema_of_type(kind: Any, where: str, definitions: dict[str, Any]) -> dict[str, Any]:
    try:
        [schema], found = msgspec.json.schema_components([kind], ref_template="#/$defs/{name}")
    except Exception as problem:  # msgspec passes on what a type's own methods raise
        raise InvalidInput(f"the type of {where} has no JSON schema: {problem}") from None
    definitions |= found
    return schema


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Split a docstring into the description and a text for each parameter."""
    description: list[str] = []
    texts: dict[str, str] = {}
    last: str | None = None
    in_arguments = False
    for line in text.splitlines():
        if re.match(r"^\s*(Args|Arguments|Parameters)\s*:?\s*$", line):
            in_arguments = True
        elif _SECTION.match(line):
            break
        elif (match := _PARAMETER.match(line)) and (in_arguments or ":param" in line):
            name, text = match.groups()
            texts[name] = text.strip()
            last = name
        elif in_arguments and last is not None and line.startswith(" ") and line.strip():
            texts[last] += " " + line.strip()
        elif not in_arguments:
            description.append(line)
    return "\n".join(description).strip(), texts


def call_function(tool: Tool, arguments: Mapping[str, Any]) -> Any:
    """Call a tool's Python function with arguments, converted to the annotated types.

    Raises:
        InvalidInput: the tool has no function, or the arguments are not of its types.
    """
    if tool.function is None:
        raise InvalidInput(
            f"the tool {tool.name} was made from a schema and has no function to call"
        )
    hints = typing.get_type_hints(tool.function, include_extras=True)
    try:
        converted = {
            name: msgspec.convert(value, hints.get(name, Any)) for name, value in arguments.items()
        }
    except msgspec.ValidationError as problem:
        raise InvalidInput(
            f"the arguments of {tool.name} are of the wrong type: {problem}"
        ) from None
    return tool.function(**converted)

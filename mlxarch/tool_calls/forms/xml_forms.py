"""Forms with a tag for each argument; its text becomes JSON here, by the type in the tool's schema."""

import json
from collections.abc import Mapping, Sequence

from mlxarch.tool_calls.events import CallWriter
from mlxarch.tool_calls.form import (
    FREE_TEXT,
    CallForm,
    CallRules,
    ToolRule,
    finish_call,
    parameter_types,
    parameters_in_order,
)
from mlxarch.tool_calls.scanner import Broken, Scanner, Steps, quoted
from mlxarch.tool_calls.tool import Tool

_WORDS = {"true": "true", "false": "false", "null": "null", "none": "null"}


def json_of_text(text: str, types: set[str] | None) -> str:
    """Return the JSON of an argument that is written as text.

    Args:
        text: what the model wrote.
        types: JSON types that the schema allows; None if it does not say.
    """
    plain = text.strip()
    if types is None or types == {"string"}:
        return json.dumps(text, ensure_ascii=False)
    word = _WORDS.get(plain.lower())
    if word == "null" and "null" in types or word in ("true", "false") and "boolean" in types:
        return word or ""
    if types & {"integer", "number", "object", "array"}:
        try:
            value = json.loads(plain)
        except (ValueError, RecursionError):
            value = None
        kinds = {int: "integer", float: "number", dict: "object", list: "array"}
        kind = kinds.get(type(value))
        if kind in types or (kind == "integer" and "number" in types):
            return plain
    return json.dumps(text, ensure_ascii=False)


def read_value(scan: Scanner, calls: CallWriter, end: str, types: set[str] | None) -> Steps[None]:
    """Read an argument up to its end; a text is passed on as it comes."""
    if types is not None and types != {"string"}:
        text, _ = yield from scan.until(end)
        yield calls.arguments(json_of_text(text, types))
        return
    yield calls.arguments('"')
    yield from scan.pieces_until(end, lambda piece: calls.arguments(_escaped(piece)))
    yield calls.arguments('"')


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def key(name: str, first: bool) -> str:
    """JSON text in front of the value of an argument."""
    return f"{'{' if first else ', '}{json.dumps(name, ensure_ascii=False)}: "


def text_terminal(tool: Tool, parameter: str) -> str:
    """Terminal of an argument that is written as text: any text of the lengths in the schema."""
    schema = (tool.parameters.get("properties") or {}).get(parameter)
    given: Mapping[str, object] = schema if isinstance(schema, Mapping) else {}
    low, high = given.get("minLength", 0), given.get("maxLength", "")
    return f"/(.|\\n){{{low},{high}}}/" if low or high != "" else FREE_TEXT


def value_rule(name: str, tool: ToolRule, parameter: str, end: str) -> str:
    """Rule of an argument with the text behind it."""
    if tool.tool.text_grammar is not None:
        return f"{name}: {tool.values[parameter]} {quoted(end)}"
    types = parameter_types(tool.tool, parameter)
    schema = (tool.tool.parameters.get("properties") or {}).get(parameter)
    choices = schema.get("enum") if isinstance(schema, Mapping) else None
    if isinstance(choices, list) and choices and all(isinstance(each, str) for each in choices):
        return f"{name}: ({' | '.join(map(quoted, choices))}) {quoted(end)}"
    if types is None or types == {"string"}:
        return f"{name}[suffix={quoted(end)}]: {text_terminal(tool.tool, parameter)}"
    words = [quoted(word) for word in ("true", "false") if types == {"boolean"}]
    words += [quoted(word.title()) for word in ("true", "false") if types == {"boolean"}]
    return f"{name}: ({' | '.join(words) if words else tool.values[parameter]}) {quoted(end)}"


class TaggedParameters(CallForm):
    """``<function=name>`` with a ``<parameter=…>`` for each argument: Qwen3-Coder, Qwen3.5."""

    name = "parameters in tags"
    by_parameter = True
    texts_are_bare = True
    mark_texts = ("<tool_call>", "</tool_call>")

    @property
    def openings(self) -> tuple[tuple[str, str], ...]:
        """Implement ``CallForm``: the outer tag is sometimes left out."""
        return ((self.code("<tool_call>"), "anywhere"), ("<function=", "line"))

    def read(self, scan: Scanner, calls: CallWriter, tools: Mapping[str, Tool]) -> Steps[None]:
        """Implement ``CallForm``."""
        yield from scan.accept(self.code("<tool_call>"))
        yield from scan.blanks()
        yield from scan.expect("<function=")
        name, _ = yield from scan.until(">", limit=200)
        if not name.strip() or "\n" in name:
            raise Broken("a call must have a name")
        yield calls.start(name.strip())
        first = True
        while True:
            yield from scan.blanks()
            if (yield from scan.expect("<parameter=", "</function>")) == "</function>":
                break
            parameter, _ = yield from scan.until(">", limit=1000)
            yield from scan.accept("\n")
            yield calls.arguments(key(parameter.strip(), first))
            types = parameter_types(tools.get(name.strip()), parameter.strip())
            yield from read_value(scan, calls, "\n</parameter>", types)
            first = False
        yield calls.arguments("{}" if first else "}")
        yield from scan.blanks()
        yield from scan.accept(self.code("</tool_call>"))
        yield finish_call(scan, calls)

    def rules(self, tools: Sequence[ToolRule]) -> CallRules:
        """Implement ``CallForm``."""
        opening, closing = (self.marks[text] for text in self.mark_texts)
        between = f'{closing.lark} "\\n" {opening.lark} "\\n"'
        lines: list[str] = []
        for index, tool in enumerate(tools):
            parts: list[str] = []
            for number, (parameter, required) in enumerate(parameters_in_order(tool.tool)):
                rule = f"value_{index}_{number}"
                tag = quoted(f"<parameter={parameter}>\n")
                parts.append(f"({tag} {rule})" + ("" if required else "?"))
                lines.append(value_rule(rule, tool, parameter, "\n</parameter>\n"))
            head = quoted(f"<function={tool.name}>\n")
            lines.append(f'call_{index}: {head} {" ".join(parts)} "</function>\\n"')
        return CallRules(opening, '"\\n"', lines, between, closing.lark)


class TaggedPairs(CallForm):
    """``<arg_key>`` and ``<arg_value>`` for each argument: GLM-4.5."""

    name = "keys and values in tags"
    by_parameter = True
    texts_are_bare = True
    mark_texts = (
        *("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>"),
        *("<arg_value>", "</arg_value>"),
    )
    before = "\n"

    @property
    def openings(self) -> tuple[tuple[str, str], ...]:
        """Implement ``CallForm``."""
        return ((self.code("<tool_call>"), "anywhere"),)

    def read(self, scan: Scanner, calls: CallWriter, tools: Mapping[str, Tool]) -> Steps[None]:
        """Implement ``CallForm``."""
        _, close, key_open, key_close, value_open, value_close = map(self.code, self.mark_texts)
        yield from scan.expect(self.code("<tool_call>"))
        name, end = yield from scan.until(key_open, close, limit=1000)
        name = name.strip()
        if not name or "\n" in name:
            raise Broken("a call must have a name")
        yield calls.start(name)
        first = True
        while end != close:
            parameter, _ = yield from scan.until(key_close)
            yield from scan.blanks()
            yield from scan.expect(value_open)
            yield calls.arguments(key(parameter.strip(), first))
            types = parameter_types(tools.get(name), parameter.strip())
            yield from read_value(scan, calls, value_close, types)
            first = False
            yield from scan.blanks()
            end = yield from scan.expect(key_open, close)
        yield calls.arguments("{}" if first else "}")
        yield finish_call(scan, calls)

    def rules(self, tools: Sequence[ToolRule]) -> CallRules:
        """Implement ``CallForm``."""
        opening, closing, key_open, key_close, value_open, value_close = (
            self.marks[text] for text in self.mark_texts
        )
        lines: list[str] = []
        for index, tool in enumerate(tools):
            parts: list[str] = []
            for number, (parameter, required) in enumerate(parameters_in_order(tool.tool)):
                rule = f"value_{index}_{number}"
                pair = (
                    f"{key_open.lark} {quoted(parameter)} {key_close.lark} "
                    f'"\\n" {value_open.lark} {rule} "\\n"'
                )
                parts.append(f"({pair})" + ("" if required else "?"))
                lines.append(self._value(rule, tool, parameter, value_close.lark))
            head = quoted(f"{tool.name}\n")
            lines.append(f"call_{index}: {head} {' '.join(parts)}")
        between = f'{closing.lark} "\\n" {opening.lark}'
        return CallRules(opening, '""', lines, between, closing.lark)

    def _value(self, rule: str, tool: ToolRule, parameter: str, end: str) -> str:
        """Rule of an argument: text as it is, other values as JSON."""
        mark = self.marks["</arg_value>"]
        if mark.token is None:
            return value_rule(rule, tool, parameter, mark.text)
        types = parameter_types(tool.tool, parameter)
        is_free = tool.tool.text_grammar is None
        is_text = is_free and (types is None or types == {"string"})
        schema = (tool.tool.parameters.get("properties") or {}).get(parameter) or {}
        choices = schema.get("enum") if isinstance(schema, Mapping) else None
        if is_text and isinstance(choices, list):
            return f"{rule}: ({' | '.join(quoted(str(each)) for each in choices)}) {end}"
        if is_text:
            return f"{rule}: {rule.upper()} {end}\n{rule.upper()}: {text_terminal(tool.tool, parameter)}"
        return f"{rule}: {tool.values[parameter]} {end}"

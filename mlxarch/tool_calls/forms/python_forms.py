"""Forms with calls as Python writes them, ``f(a=1, b="x")``, and the bare objects of Llama."""

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mlxarch.tool_calls.events import CallWriter
from mlxarch.tool_calls.form import (
    CallForm,
    CallRules,
    ToolRule,
    finish_call,
    parameters_in_order,
)
from mlxarch.tool_calls.forms.json_forms import object_calls, read_named_object
from mlxarch.tool_calls.forms.xml_forms import key
from mlxarch.tool_calls.scanner import Broken, Scanner, Steps, is_mark, quoted
from mlxarch.tool_calls.tool import Tool

_CONSTANTS = {"true": True, "false": False, "null": None, "none": None}
_MAX_DEPTH = 64
_PAIRS = {"(": ")", "[": "]", "{": "}"}


def read_python_call(scan: Scanner, calls: CallWriter) -> Steps[None]:
    """Read ``name(key=value, …)``; each argument is passed on when it is complete."""
    name, _ = yield from scan.until("(", limit=200)
    name = name.strip()
    if not name.replace(".", "_").replace("-", "_").isidentifier():
        raise Broken("a call must have a name")
    yield calls.start(name)
    first = True
    while True:
        yield from scan.blanks()
        if (yield from scan.accept(")")):
            break
        parameter, _ = yield from scan.until("=", limit=1000)
        if not parameter.strip().isidentifier():
            raise Broken("an argument must have a name")
        value, end = yield from _literal(scan)
        yield calls.arguments(key(parameter.strip(), first) + value)
        first = False
        if end == ")":
            break
    yield calls.arguments("{}" if first else "}")


def _literal(scan: Scanner) -> Steps[tuple[str, str]]:
    """Take a literal and the comma or parenthesis behind it. Return its JSON and that character."""
    text = ""
    stack: list[str] = []
    quote = ""
    escaped = False
    while True:
        if not (yield from scan.wait()):
            raise Broken("the answer is over within a call")
        character = scan.take(1)
        if is_mark(character) or len(stack) > _MAX_DEPTH:
            raise Broken("an argument is no Python literal")
        if quote:
            if not escaped and character == quote:
                quote = ""
            escaped = character == "\\" and not escaped
        elif character in "\"'":
            quote = character
        elif character in _PAIRS:
            stack.append(_PAIRS[character])
        elif stack and character == stack[-1]:
            stack.pop()
        elif not stack and character in ",)":
            return _json_of_literal(text), character
        text += character


def _json_of_literal(text: str) -> str:
    plain = text.strip()
    try:  # the text of a number survives so
        json.loads(plain)
        return plain
    except (ValueError, RecursionError):
        pass
    try:
        value = _value(ast.parse(plain.replace("\n", "\\n"), mode="eval").body)
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as problem:
        raise Broken(f"an argument is no Python literal: {problem}") from None


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() | int() | float() | bool() | None as value):
            return value
        case ast.Name(id=name) if name.lower() in _CONSTANTS:
            return _CONSTANTS[name.lower()]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            names = [_value(name) if name is not None else None for name in keys]
            if all(isinstance(name, str) for name in names):
                return dict(zip(names, map(_value, values), strict=True))
    raise ValueError(f"{ast.unparse(node)[:80]} is no literal")


def python_calls(tools: Sequence[ToolRule]) -> list[str]:
    """Rules of calls with arguments in the order of the schema, optional ones left out or not."""
    lines: list[str] = []
    for index, tool in enumerate(tools):
        parameters = parameters_in_order(tool.tool)
        head = quoted(f"{tool.name}(")
        lines.append(f'call_{index}: {head} first_{index}_0 ")"')
        for number, (parameter, required) in enumerate(parameters):
            for position, comma in (("first", ""), ("later", ", ")):
                head = quoted(f"{comma}{parameter}=")
                rule = f"{head} value_{index}_{number} later_{index}_{number + 1}"
                skipped = "" if required else f" | {position}_{index}_{number + 1}"
                lines.append(f"{position}_{index}_{number}: {rule}{skipped}")
            lines.append(f"value_{index}_{number}: {tool.values[parameter]}")
        lines += [f'{position}_{index}_{len(parameters)}: ""' for position in ("first", "later")]
    return lines


class PythonLines(CallForm):
    """``<function_calls>`` around a Python call on each line: OLMo 3."""

    name = "Python calls in lines"
    by_parameter = True
    mark_texts = ("<function_calls>", "</function_calls>")

    @property
    def openings(self) -> tuple[tuple[str, str], ...]:
        """Implement ``CallForm``."""
        return ((self.code("<function_calls>"), "anywhere"),)

    def read(self, scan: Scanner, calls: CallWriter, tools: Mapping[str, Tool]) -> Steps[None]:
        """Implement ``CallForm``."""
        close = self.code("</function_calls>")
        yield from scan.expect(self.code("<function_calls>"))
        while True:
            yield from scan.blanks()
            if not (yield from scan.wait()) or (yield from scan.accept(close)):
                return
            yield from read_python_call(scan, calls)
            yield finish_call(scan, calls)

    def rules(self, tools: Sequence[ToolRule]) -> CallRules:
        """Implement ``CallForm``."""
        opening, closing = (self.marks[text] for text in self.mark_texts)
        return CallRules(opening, '"\\n"', python_calls(tools), '"\\n"', f'"\\n" {closing.lark}')


class PythonList(CallForm):
    """A list of Python calls between two marks: LFM2."""

    name = "a list of Python calls"
    by_parameter = True
    mark_texts = ("<|tool_call_start|>", "<|tool_call_end|>")

    @property
    def openings(self) -> tuple[tuple[str, str], ...]:
        """Implement ``CallForm``."""
        return ((self.code("<|tool_call_start|>"), "anywhere"),)

    def read(self, scan: Scanner, calls: CallWriter, tools: Mapping[str, Tool]) -> Steps[None]:
        """Implement ``CallForm``."""
        yield from scan.expect(self.code("<|tool_call_start|>"))
        yield from scan.blanks()
        yield from _read_list(scan, calls)
        yield from scan.accept(self.code("<|tool_call_end|>"))

    def rules(self, tools: Sequence[ToolRule]) -> CallRules:
        """Implement ``CallForm``."""
        opening, closing = (self.marks[text] for text in self.mark_texts)
        return CallRules(opening, '"["', python_calls(tools), '", "', f'"]" {closing.lark}')


def _read_list(scan: Scanner, calls: CallWriter) -> Steps[None]:
    yield from scan.expect("[")
    while True:
        yield from scan.blanks()
        yield from read_python_call(scan, calls)
        yield from scan.blanks()
        end = yield from scan.expect(",", "]")
        yield finish_call(scan, calls)
        if end == "]":
            return


class BareCalls(CallForm):
    """The answer is a JSON object, or a list of Python calls, perhaps behind a mark: Llama 3 and 4."""

    name = "a bare object"
    mark_texts = ("<|python_tag|>", "<|python_start|>", "<|python_end|>")
    parallel = False

    @property
    def openings(self) -> tuple[tuple[str, str], ...]:
        """Implement ``CallForm``."""
        marks = [self.marks[text] for text in self.mark_texts[:2]]
        tags = [(mark.code, "anywhere") for mark in marks if mark.token is not None]
        return (("{", "start"), ("[", "start"), *tags)

    def read(self, scan: Scanner, calls: CallWriter, tools: Mapping[str, Tool]) -> Steps[None]:
        """Implement ``CallForm``."""
        tag, start, end = map(self.code, self.mark_texts)
        yield from scan.accept(tag, start)
        more = True
        while more:
            yield from scan.blanks()
            yield from scan.wait()
            if scan.buffer.startswith("["):
                yield from _read_list(scan, calls)
            else:
                yield from read_named_object(scan, calls)
                yield finish_call(scan, calls)
            yield from scan.blanks()
            yield from scan.accept(end, ";")
            yield from scan.blanks()
            more = (yield from scan.wait()) and scan.buffer[0] == "{"

    def rules(self, tools: Sequence[ToolRule]) -> CallRules:
        """Implement ``CallForm``."""
        start, end = self.marks["<|python_start|>"], self.marks["<|python_end|>"]
        calls = object_calls(tools, "parameters")
        if start.token is not None and start.text in self.template:
            return CallRules(start, '""', calls, '""', end.lark)
        return CallRules("", '""', calls, '""', '""')

    def free_start(self, opening: str) -> str:
        """Implement ``CallForm``: the first character decides."""
        return "start: FREE | calls\nFREE: /([^{\\[](.|\\n)*)?/"

"""Forms with arguments as JSON: objects with a name, or a name and then the arguments."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mlxarch.tool_calls.events import CallWriter
from mlxarch.tool_calls.form import CallForm, CallRules, ToolRule, finish_call
from mlxarch.tool_calls.scanner import Broken, Mark, Scanner, Steps, quoted
from mlxarch.tool_calls.tool import Tool

_NAME_KEYS = ('"name"', '"function"')
_ARGUMENT_KEYS = ('"arguments"', '"parameters"')


def read_named_object(scan: Scanner, calls: CallWriter) -> Steps[None]:
    """Read ``{"name": …, "arguments": {…}}``; the arguments are passed on as they come."""
    start = len(scan.taken)
    name = yield from _name_first(scan)
    if name is None:
        scan.rewind(start)
        yield from _read_whole_object(scan, calls)
        return
    yield calls.start(name)
    yield from read_arguments(scan, calls)
    yield from scan.blanks()
    while (yield from scan.accept(",")):  # further keys, such as an id
        yield from scan.json_value()
        yield from scan.blanks()
        yield from scan.expect(":")
        yield from scan.json_value()
        yield from scan.blanks()
    yield from scan.expect("}")


def read_arguments(scan: Scanner, calls: CallWriter) -> Steps[None]:
    """Read the arguments: an object, or a text that holds one."""
    yield from scan.blanks()
    yield from scan.wait()
    if scan.buffer.startswith('"'):
        yield calls.arguments(_text(_loads((yield from scan.json_value()))))
    else:
        yield from scan.json_value(calls.arguments)


def _name_first(scan: Scanner) -> Steps[str | None]:
    """Read the beginning of an object up to its arguments; None if its keys are others."""
    yield from scan.expect("{")
    yield from scan.blanks()
    if not (yield from scan.accept(*_NAME_KEYS)):
        return None
    yield from scan.blanks()
    yield from scan.expect(":")
    name = _text(_loads((yield from scan.json_value())))
    yield from scan.blanks()
    if not (yield from scan.accept(",")):
        return None
    yield from scan.blanks()
    if not (yield from scan.accept(*_ARGUMENT_KEYS)):
        return None
    yield from scan.blanks()
    yield from scan.expect(":")
    return name


def _read_whole_object(scan: Scanner, calls: CallWriter) -> Steps[None]:
    """Read an object with its keys in any order."""
    value = _loads((yield from scan.json_value()))
    given: dict[str, Any] = value if isinstance(value, dict) else {}
    name = next((given[key] for key in ("name", "function") if key in given), None)
    keys = [key for key in ("arguments", "parameters") if key in given]
    if not keys and given.keys() - {"name", "type", "id"}:
        raise Broken("a call must have a name and arguments")
    yield calls.start(_text(name))
    arguments = given[keys[0]] if keys else {}
    as_text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    yield calls.arguments(as_text)


def _loads(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise Broken(f"not JSON: {problem}") from None


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise Broken("a call must have a name")
    return value


def object_calls(tools: Sequence[ToolRule], arguments: str) -> list[str]:
    """Rules of calls as objects with a name and, under the key ``arguments``, the arguments."""
    lines: list[str] = []
    for index, tool in enumerate(tools):
        head = quoted(f'{{"name": {json.dumps(tool.name)}, "{arguments}": ')
        lines += [f'call_{index}: {head} args_{index} "}}"', f"args_{index}: {tool.rule}"]
    return lines


class TaggedObjects(CallForm):
    """``<tool_call>`` around each JSON object: Hermes, Qwen3, SmolLM3 and many others."""

    name = "objects in <tool_call> tags"
    mark_texts = ("<tool_call>", "</tool_call>")

    @property
    def openings(self) -> tuple[tuple[str, str], ...]:
        """Implement ``CallForm``."""
        return ((self.code("<tool_call>"), "anywhere"),)

    def read(self, scan: Scanner, calls: CallWriter, tools: Mapping[str, Tool]) -> Steps[None]:
        """Implement ``CallForm``."""
        yield from scan.expect(self.code("<tool_call>"))
        yield from scan.blanks()
        yield from read_named_object(scan, calls)
        yield from scan.blanks()
        yield from scan.accept(self.code("</tool_call>"))
        yield finish_call(scan, calls)

    def rules(self, tools: Sequence[ToolRule]) -> CallRules:
        """Implement ``CallForm``."""
        opening, closing = (self.marks[text] for text in self.mark_texts)
        between = f'"\\n" {closing.lark} "\\n" {opening.lark} "\\n"'
        calls = object_calls(tools, "arguments")
        return CallRules(opening, '"\\n"', calls, between, f'"\\n" {closing.lark}')


class MarkedList(CallForm):
    """``[TOOL_CALLS]`` and a JSON list of objects: Mistral's tokenizers up to version 7."""

    name = "a list behind [TOOL_CALLS]"
    mark_texts = ("[TOOL_CALLS]",)
    id_format = ("", 9)

    @property
    def openings(self) -> tuple[tuple[str, str], ...]:
        """Implement ``CallForm``."""
        return ((self.code("[TOOL_CALLS]"), "anywhere"),)

    def read(self, scan: Scanner, calls: CallWriter, tools: Mapping[str, Tool]) -> Steps[None]:
        """Implement ``CallForm``."""
        yield from scan.expect(self.code("[TOOL_CALLS]"))
        yield from scan.blanks()
        yield from scan.expect("[")
        while True:
            yield from scan.blanks()
            yield from read_named_object(scan, calls)
            yield from scan.blanks()
            end = yield from scan.expect(",", "]")
            yield finish_call(scan, calls)
            if end == "]":
                return

    def rules(self, tools: Sequence[ToolRule]) -> CallRules:
        """Implement ``CallForm``."""
        blank = '" ["' if "[TOOL_CALLS] [" in self.template else '"["'
        calls = object_calls(tools, "arguments")
        return CallRules(self.marks["[TOOL_CALLS]"], blank, calls, '", "', '"]"')


class MarkedNames(CallForm):
    """``[TOOL_CALLS]name[ARGS]{…}`` for each call: Mistral's tokenizers from version 11 on."""

    name = "names behind [TOOL_CALLS]"
    mark_texts = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
    id_format = ("", 9)

    @property
    def openings(self) -> tuple[tuple[str, str], ...]:
        """Implement ``CallForm``."""
        return ((self.code("[TOOL_CALLS]"), "anywhere"),)

    def read(self, scan: Scanner, calls: CallWriter, tools: Mapping[str, Tool]) -> Steps[None]:
        """Implement ``CallForm``."""
        call_id, args = self.code("[CALL_ID]"), self.code("[ARGS]")
        yield from scan.expect(self.code("[TOOL_CALLS]"))
        name, end = yield from scan.until(call_id, args, "{")
        given = None
        if end == call_id:
            given, end = yield from scan.until(args, "{")
        if end == "{":
            scan.rewind(len(scan.taken) - 1)
        if not name.strip():
            raise Broken("a call must have a name")
        yield calls.start(name.strip(), given and given.strip())
        yield from read_arguments(scan, calls)
        yield finish_call(scan, calls)

    def rules(self, tools: Sequence[ToolRule]) -> CallRules:
        """Implement ``CallForm``."""
        start, call_id, args = (self.marks[text] for text in self.mark_texts)
        has_id = "[CALL_ID]" in self.template
        id_part = f"{call_id.lark} /[a-zA-Z0-9]{{9}}/ " if has_id else ""
        calls = [
            f"call_{index}: {quoted(tool.name)} {id_part}{args.lark} args_{index}\n"
            f"args_{index}: {tool.rule}"
            for index, tool in enumerate(tools)
        ]
        return CallRules(start, '""', calls, start.lark, '""')


class _Sections(CallForm):
    """One section with all calls, each between marks of its own."""

    section: tuple[str, str]
    call: tuple[str, str, str]

    @property
    def openings(self) -> tuple[tuple[str, str], ...]:
        """Implement ``CallForm``."""
        return ((self.code(self.section[0]), "anywhere"),)

    def read(self, scan: Scanner, calls: CallWriter, tools: Mapping[str, Tool]) -> Steps[None]:
        """Implement ``CallForm``."""
        begin, middle, end = map(self.code, self.call)
        close = self.code(self.section[1])
        yield from scan.expect(self.code(self.section[0]))
        while True:
            yield from scan.blanks()
            found = yield from scan.accept(begin, close)
            if found != begin:
                return
            head, _ = yield from scan.until(middle)
            yield from self.read_call(scan, calls, head.strip())
            yield from scan.blanks()
            yield from scan.accept(end)
            yield finish_call(scan, calls)

    def read_call(self, scan: Scanner, calls: CallWriter, head: str) -> Steps[None]:
        """Read a call behind its head."""
        raise NotImplementedError

    def head(self, tool: ToolRule, middle: Mark) -> str:
        """Return the Lark expression of a call up to its arguments."""
        raise NotImplementedError

    def rules(self, tools: Sequence[ToolRule]) -> CallRules:
        """Implement ``CallForm``."""
        begin, middle, end = (self.marks[text].lark for text in self.call)
        calls = [
            f"call_{index}: {begin} {self.head(tool, self.marks[self.call[1]])} args_{index} "
            f"{self.tail}{end}\nargs_{index}: {tool.rule}"
            for index, tool in enumerate(tools)
        ]
        opening, closing = (self.marks[text] for text in self.section)
        return CallRules(opening, '""', calls, self.separator, closing.lark)

    tail = ""
    separator = '""'


class NumberedSections(_Sections):
    """Sections whose calls have ids such as ``functions.weather:0``: Kimi K2."""

    name = "a section with ids"
    section = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
    call = ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")
    mark_texts = (*section, *call)

    def read_call(self, scan: Scanner, calls: CallWriter, head: str) -> Steps[None]:
        """Implement ``_Sections``: the id that the model wrote is kept."""
        name = head.removeprefix("functions.").partition(":")[0]
        if not name:
            raise Broken("a call must have a name")
        yield calls.start(name, head)
        yield from read_arguments(scan, calls)

    def head(self, tool: ToolRule, middle: Mark) -> str:
        """Implement ``_Sections``."""
        call_id = quoted(f"functions.{tool.name}:")
        return f"{call_id} /0|[1-9][0-9]{{0,3}}/ {middle.lark}"


class FencedSections(_Sections):
    """Sections with a name before a separator; the arguments may stand in a fence: DeepSeek."""

    name = "a section with separators"
    section = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
    call = ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>")
    mark_texts = (*section, *call)

    @property
    def _is_fenced(self) -> bool:
        return "```json" in self.template

    def read_call(self, scan: Scanner, calls: CallWriter, head: str) -> Steps[None]:
        """Implement ``_Sections``: with a fence, the head is the word "function"."""
        name = head
        if head == "function":
            name, _ = yield from scan.until("\n")
            name = name.strip()
        if not name:
            raise Broken("a call must have a name")
        yield calls.start(name)
        yield from scan.blanks()
        fence = yield from scan.accept("```json", "```")
        yield from read_arguments(scan, calls)
        yield from scan.blanks()
        if fence:
            yield from scan.accept("```")

    def head(self, tool: ToolRule, middle: Mark) -> str:
        """Implement ``_Sections``."""
        if self._is_fenced:
            fence = quoted(f"{tool.name}\n```json\n")
            return f'"function" {middle.lark} {fence}'
        return f"{quoted(tool.name)} {middle.lark}"

    @property
    def tail(self) -> str:  # type: ignore[override]
        """Text behind the arguments."""
        return '"\\n```" ' if self._is_fenced else ""

    @property
    def separator(self) -> str:  # type: ignore[override]
        """Expression between two calls."""
        return '"\\n"' if self._is_fenced else '""'

"""Objects with bare keys, and texts between marks of their own: Gemma 4."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mlxarch.structured_output.schema import resolve
from mlxarch.tool_calls.events import CallWriter
from mlxarch.tool_calls.form import FREE_TEXT, CallForm, CallRules, ToolRule, finish_call
from mlxarch.tool_calls.forms.xml_forms import key
from mlxarch.tool_calls.scanner import Broken, Mark, Scanner, Steps, quoted
from mlxarch.tool_calls.tool import Tool

_MAX_DEPTH = 64


class BareKeys(CallForm):
    """``call:name{key:value,…}`` with texts between marks of their own, and bare keys: Gemma 4."""

    name = "bare keys"
    holds_text_grammars = False
    mark_texts = ("<|tool_call>", "<tool_call|>", '<|"|>')

    @property
    def openings(self) -> tuple[tuple[str, str], ...]:
        """Implement ``CallForm``."""
        return ((self.code("<|tool_call>"), "anywhere"),)

    def read(self, scan: Scanner, calls: CallWriter, tools: Mapping[str, Tool]) -> Steps[None]:
        """Implement ``CallForm``."""
        yield from scan.expect(self.code("<|tool_call>"))
        yield from scan.blanks()
        yield from scan.expect("call:")
        name, _ = yield from scan.until("{", limit=200)
        if not name.strip():
            raise Broken("a call must have a name")
        yield calls.start(name.strip())
        yield from scan.blanks()
        first = True
        while not (yield from scan.accept("}")):
            if not first:
                yield from scan.expect(",")
                yield from scan.blanks()
            parameter = yield from self._key(scan)
            value = yield from self._value(scan, 0)
            yield calls.arguments(key(parameter, first) + value)
            first = False
        yield calls.arguments("{}" if first else "}")
        yield from scan.blanks()
        yield from scan.accept(self.code("<tool_call|>"))
        yield finish_call(scan, calls)

    def _key(self, scan: Scanner) -> Steps[str]:
        mark = self.code('<|"|>')
        if (yield from scan.accept(mark)):
            name, _ = yield from scan.until(mark)
            yield from scan.expect(":")
        else:
            name, _ = yield from scan.until(":", limit=1000)
        return name.strip().strip('"')

    def _value(self, scan: Scanner, depth: int) -> Steps[str]:
        """Take a value with the blanks behind it. Return its JSON."""
        mark = self.code('<|"|>')
        if depth > _MAX_DEPTH:
            raise Broken("the arguments nest too deeply")
        yield from scan.blanks()
        opening = yield from scan.accept(mark, "{", "[")
        if opening == mark:
            text, _ = yield from scan.until(mark)
            value = json.dumps(text, ensure_ascii=False)
        elif opening in ("{", "["):
            value = yield from self._members(scan, opening or "", depth)
        else:
            text = yield from scan.json_value()
            value = _WORDS.get(text.lower(), text)
        yield from scan.blanks()
        return value

    def _members(self, scan: Scanner, opening: str, depth: int) -> Steps[str]:
        end = "}" if opening == "{" else "]"
        parts: list[str] = []
        yield from scan.blanks()
        while not (yield from scan.accept(end)):
            if parts:
                yield from scan.expect(",")
                yield from scan.blanks()
            name = ""
            if opening == "{":
                name = json.dumps((yield from self._key(scan)), ensure_ascii=False) + ": "
            parts.append(name + (yield from self._value(scan, depth + 1)))
        return f"{opening}{', '.join(parts)}{end}"

    def rules(self, tools: Sequence[ToolRule]) -> CallRules:
        """Implement ``CallForm``."""
        opening, closing, _ = (self.marks[text] for text in self.mark_texts)
        lines = _BareGrammar(self.marks['<|"|>'], "dictsort" in self.template)
        for index, tool in enumerate(tools):
            arguments = lines.rule(tool.tool.schema, tool.tool.schema)
            lines.add(f"call_{index}: {quoted(f'call:{tool.name}')} {arguments}")
        between = f"{closing.lark} {opening.lark}"
        return CallRules(opening, '""', lines.lines, between, closing.lark)


_WORDS = {"true": "true", "false": "false", "null": "null", "none": "null"}


class _BareGrammar:
    """Rules of values with bare keys, by their schemas; types, enums and required keys are held."""

    def __init__(self, mark: Mark, is_sorted: bool) -> None:
        self._text = f"{mark.lark} BARE_TEXT {mark.lark}"
        if mark.token is None:
            self._text = f"{mark.lark} bare_text"
        self._is_sorted = is_sorted
        self._known: dict[int, str] = {}
        self.lines = [
            f"BARE_TEXT: {FREE_TEXT}",
            f"bare_text[suffix={quoted(mark.text)}]: {FREE_TEXT}",
            'bare_number: %json {"type": "number"}',
            'bare_integer: %json {"type": "integer"}',
            'bare_boolean: "true" | "false"',
            f"bare_string: {self._text}",
            'bare_null: "null" | "None"',
            "bare_any: bare_string | bare_number | bare_boolean | bare_null | bare_list",
            'bare_list: "[" (bare_any ("," bare_any)*)? "]"',
        ]

    def add(self, line: str) -> None:
        """Append a rule."""
        self.lines.append(line)

    def rule(self, schema: Any, root: Mapping[str, Any]) -> str:
        """Return the name of the rule of a schema's values."""
        schema = resolve(schema, root)
        if not isinstance(schema, Mapping):
            return "bare_any"
        if id(schema) in self._known:
            return self._known[id(schema)]
        name = self._known[id(schema)] = f"bare_{len(self._known)}"
        self.add(f"{name}: {self._expression(schema, root)}")
        return name

    def _expression(self, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
        for keyword in ("anyOf", "oneOf"):
            if isinstance(branches := schema.get(keyword), list) and branches:
                return " | ".join(self.rule(branch, root) for branch in branches)
        values = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(values, list) and values:
            return " | ".join(map(self._constant, values))
        kind = schema.get("type")
        kinds = kind if isinstance(kind, list) else [kind]
        found: list[str] = []
        for each in kinds:
            if each == "object" and isinstance(schema.get("properties"), Mapping):
                found.append(self._object(schema, root))
            elif each == "array" and isinstance(schema.get("items"), Mapping):
                item = self.rule(schema["items"], root)
                found.append(f'"[" ({item} ("," {item})*)? "]"')
            elif each in ("string", "number", "integer", "boolean", "null"):
                found.append(f"bare_{each}")
            else:
                found.append("bare_list" if each == "array" else "bare_any")
        return " | ".join(found)

    def _constant(self, value: Any) -> str:
        if isinstance(value, str):
            return self._text.replace("BARE_TEXT", quoted(value)).replace(
                "bare_text", quoted(value) + ' "<|\\"|>"'
            )
        return quoted(json.dumps(value))

    def _object(self, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
        """Expression of an object; a key that is not required may be left out."""
        properties = schema["properties"]
        names = sorted(properties) if self._is_sorted else list(properties)
        required = set(schema.get("required") or ())
        place = f"bare_keys_{len(self.lines)}"
        for number, name in enumerate(names):
            value = self.rule(properties[name], root)
            for position, comma in (("first", ""), ("later", ",")):
                following = f"{place}_later_{number + 1}"
                pair = f"{quoted(f'{comma}{name}:')} {value} {following}"
                skipped = "" if name in required else f" | {place}_{position}_{number + 1}"
                self.add(f"{place}_{position}_{number}: {pair}{skipped}")
        for position in ("first", "later"):
            self.add(f'{place}_{position}_{len(names)}: ""')
        return f'"{{" {place}_first_0 "}}"'

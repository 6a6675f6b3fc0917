"""Form in which a family of models writes calls: marks, reader and grammar."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mlxarch.tokenizer.tokenizer import Tokenizer
from mlxarch.tool_calls.events import CallEvent, CallWriter
from mlxarch.tool_calls.scanner import FIRST_MARK, Mark, Scanner, Steps, quoted
from mlxarch.tool_calls.tool import Tool

FREE_TEXT = "/(.|\\n)*/"
"""Any text, as a terminal of Lark; control tokens are not part of it."""


@dataclass(frozen=True)
class ToolRule:
    """Tool with the compiled rule of its arguments.

    Attributes:
        tool: the tool.
        rule: Lark expression of the whole arguments object.
        values: Lark expression of each parameter, for forms that write parameters one by one.
    """

    tool: Tool
    rule: str
    values: Mapping[str, str]

    @property
    def name(self) -> str:
        """Name of the function."""
        return self.tool.name


@dataclass(frozen=True)
class CallGrammar:
    """Grammar of an answer that may call functions.

    Attributes:
        lark: the grammar.
        triggers: tokens that begin it; before, the model writes freely. Empty to begin at once.
    """

    lark: str
    triggers: frozenset[int] = frozenset()


@dataclass(frozen=True)
class CallRules:
    """Parts of the grammar of calls, in Lark.

    Attributes:
        opening: mark or text that begins the calls.
        after_opening: expression of what follows it.
        calls: rules ``call_0``, ``call_1``, … and those that they use.
        between: expression between two calls.
        closing: expression behind the last call.
    """

    opening: Mark | str
    after_opening: str
    calls: Sequence[str]
    between: str
    closing: str


class CallForm(ABC):
    """Reader and grammar of one form. Subclasses say how a single call looks.

    Attributes:
        name: name of the form, for messages.
        parallel: whether an answer may hold several calls.
        id_format: prefix and length of the identifiers of calls.
        by_parameter: whether parameters are written one by one, rather than as one object.
        texts_are_bare: whether arguments that are texts stand without quotes.
        holds_text_grammars: whether an argument that is a text can be held to a grammar of its own.
        before: text that models write between the prompt and the first call.
    """

    name: ClassVar[str]
    mark_texts: ClassVar[tuple[str, ...]] = ()
    parallel: ClassVar[bool] = True
    by_parameter: ClassVar[bool] = False
    texts_are_bare: ClassVar[bool] = False
    holds_text_grammars: ClassVar[bool] = True
    id_format: ClassVar[tuple[str, int]] = ("call_", 24)
    before: ClassVar[str] = ""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.template = tokenizer.tool_template or ""
        self.marks: dict[str, Mark] = {}
        for index, text in enumerate(self.mark_texts):
            token = tokenizer.token_id(text)
            code = text if token is None else chr(FIRST_MARK + index)
            self.marks[text] = Mark(text, token, code)

    def code(self, text: str) -> str:
        """Return how a mark stands in the scanned text."""
        return self.marks[text].code

    def has_headers(self, prompt: Sequence[int]) -> bool:
        """Whether a model writes a header in front of its answer to a prompt."""
        return False

    @property
    @abstractmethod
    def openings(self) -> tuple[tuple[str, str], ...]:
        """Scanned texts that may begin calls, each with its place: "anywhere", "line" or "start"."""

    @abstractmethod
    def read(self, scan: Scanner, calls: CallWriter, tools: Mapping[str, Tool]) -> Steps[None]:
        """Read the calls from an opening on; raises ``Broken`` for another text."""

    @abstractmethod
    def rules(self, tools: Sequence[ToolRule]) -> CallRules:
        """Return the parts of the grammar of calls."""

    def grammar(
        self, tools: Sequence[ToolRule], *, required: bool, parallel: bool, answer: str | None
    ) -> CallGrammar:
        """Build the grammar of an answer.

        Args:
            tools: tools that may be called.
            required: a call must come.
            parallel: several calls may come.
            answer: Lark expression of an answer without calls; None for free text.
        """
        parts = self.rules(tools)
        more = f"({parts.between} call)*" if parallel and self.parallel else ""
        opening = (
            f"{parts.opening.lark}" if isinstance(parts.opening, Mark) else quoted(parts.opening)
        )
        rules = "\n".join(
            (
                f"calls: {opening} body" if opening != '""' else "calls: body",
                f"body: {parts.after_opening} call {more} {parts.closing}",
                f"call: {' | '.join(f'call_{index}' for index in range(len(tools)))}",
                *parts.calls,
            )
        )
        lead = f"{quoted(self.before)}? " if self.before else ""
        if required:
            return CallGrammar(f"start: {lead}calls\n{rules}")
        if answer is not None:
            return CallGrammar(f"start: {lead}calls | answer\nanswer: {answer}\n{rules}")
        if isinstance(parts.opening, Mark) and parts.opening.token is not None:
            return CallGrammar(f"start: calls\n{rules}", frozenset({parts.opening.token}))
        text = parts.opening.text if isinstance(parts.opening, Mark) else parts.opening
        return CallGrammar(f"{self.free_start(text)}\n{rules}")

    def free_start(self, opening: str) -> str:
        """Start rule of an answer that is free text, with calls behind it or without."""
        pattern = re.sub(r"([.^$*+?()\[\]{}|\\/])", r"\\\1", opening)
        return (
            "start: FREE | before_calls body\n"
            f"FREE: {FREE_TEXT} & ~/(.|\\n)*{pattern}(.|\\n)*/\n"
            f"before_calls[suffix={quoted(opening)}]: {FREE_TEXT}"
        )


def finish_call(scan: Scanner, calls: CallWriter) -> CallEvent:
    """End a call behind its closing mark; what follows is no part of it."""
    event = calls.finish(scan.taken)
    scan.begin()
    return event


def parameters_in_order(tool: Tool) -> list[tuple[str, bool]]:
    """Names of a tool's parameters in the order of its schema, and whether each is required."""
    required = tool.parameters.get("required") or ()
    properties = tool.parameters.get("properties") or {}
    return [(name, name in required) for name in properties]


def parameter_types(tool: Tool | None, name: str) -> set[str] | None:
    """JSON types that a parameter may have; None if the schema does not say."""
    properties: Any = tool.parameters.get("properties") if tool is not None else None
    schema = properties.get(name) if isinstance(properties, Mapping) else None
    return _types(schema) if isinstance(schema, Mapping) else None


def _types(schema: Mapping[str, Any]) -> set[str] | None:
    if isinstance(kind := schema.get("type"), str):
        return {kind}
    if isinstance(kind, list):
        return {str(each) for each in kind}
    for keyword in ("anyOf", "oneOf"):
        if isinstance(branches := schema.get(keyword), list):
            found = [_types(each) if isinstance(each, Mapping) else None for each in branches]
            return None if None in found else set().union(*(each for each in found if each))
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list) and all(isinstance(value, str) for value in values):
        return {"string"}
    return None

"""Use of tools in one request: the prompt that offers them, the grammar of calls, and the parser."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlxarch.errors import InvalidInput
from mlxarch.structured_output.compiler import GrammarCompiler
from mlxarch.structured_output.json_quoting import quoted_grammar
from mlxarch.structured_output.matcher import Grammar
from mlxarch.tokenizer.tokenizer import Tokenizer
from mlxarch.tool_calls.detect import call_form
from mlxarch.tool_calls.form import CallForm, ToolRule, parameters_in_order
from mlxarch.tool_calls.forms.json_forms import TaggedObjects
from mlxarch.tool_calls.parser import CallParser
from mlxarch.tool_calls.scanner import quoted
from mlxarch.tool_calls.tool import Tool, ToolChoice, tools_of

_INSTRUCTIONS = """You can call functions. Their signatures, as JSON:
{definitions}

To call one, write only this, with the name and the arguments filled in:
<tool_call>
{{"name": NAME, "arguments": {{ARGUMENTS}}}}
</tool_call>"""


@dataclass(frozen=True)
class CompiledCalls:
    """Grammar of an answer that may call functions.

    Attributes:
        grammar: compiled grammar.
        triggers: tokens that begin it; empty to begin at once.
        warnings: a sentence for each part of a tool's schema that is not held; those of the answer
            are its grammar's own.
    """

    grammar: Grammar
    triggers: frozenset[int]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class ToolUse:
    """Tools of a request, in the form that a model knows.

    Attributes:
        form: form of the model's calls.
        tools: the tools.
        choice: "auto", "none", "required", or the name of the tool to call.
        parallel: whether an answer may hold several calls.
        native: whether the model's chat template has a place for tools; otherwise they are
            described in the system prompt.
        warnings: a sentence for each part of the request that the model cannot follow.
    """

    form: CallForm
    tools: tuple[Tool, ...]
    choice: ToolChoice = "auto"
    parallel: bool = True
    native: bool = True
    warnings: tuple[str, ...] = field(default=())

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        tools: Sequence[Any] | None,
        choice: ToolChoice = "auto",
        parallel: bool = True,
    ) -> "ToolUse | None":
        """Return the use of tools in a request; None if there are none.

        Args:
            tokenizer: the model's tokenizer.
            tools: functions, definitions or tools, see ``tool_of``.
            choice: "auto", "none", "required", or the name of the tool to call.
            parallel: whether an answer may hold several calls.

        Raises:
            InvalidInput: a tool is of the wrong form, or the choice names none.
        """
        found = tools_of(tools)
        names = [tool.name for tool in found]
        if choice not in ("auto", "none", "required", *names):
            allowed = ", ".join(("auto", "none", "required", *names))
            raise InvalidInput(f"tool_choice must be one of {allowed}; found {choice!r:.100}")
        if not found:
            if choice not in ("auto", "none"):
                raise InvalidInput(f"tool_choice is {choice}, and there are no tools")
            return None
        form = call_form(tokenizer)
        if form is not None:
            return cls(form, found, choice, parallel)
        warning = (
            "the model's chat template has no place for tools: they are described in the system "
            "prompt, and the model may not know what to do with them"
        )
        return cls(TaggedObjects(tokenizer), found, choice, parallel, False, (warning,))

    def parser(self) -> CallParser:
        """Return the parser of one answer."""
        return CallParser(self.form, self.tools, self.warnings)

    def prompt(
        self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return the messages and the variables for the chat template.

        Arguments of earlier calls are given as the template reads them, and their ids in the form
        that it accepts.
        """
        definitions = [tool.definition for tool in self.tools]
        if not self.native:
            return _described(messages, definitions), {}
        rendered = [_for_template(message, self.form) for message in messages]
        known = tokenizer.tool_variables
        name = "xml_tools" if "xml_tools" in known and "tools" not in known else "tools"
        return rendered, {name: definitions}

    def compile(self, compiler: GrammarCompiler, answer: Grammar | None = None) -> CompiledCalls:
        """Compile the grammar of an answer.

        Args:
            compiler: compiler of the model.
            answer: grammar of an answer without calls; None for free text.

        Raises:
            UnsupportedSchema: a strict tool has a keyword that no grammar can hold.
            InvalidSchema: the schema of a tool contradicts itself.
        """
        offered = [tool for tool in self.tools if self.choice in ("auto", "required", tool.name)]
        warnings: list[str] = []
        rules: list[ToolRule] = []
        for tool in offered:
            if tool.text_grammar is not None:
                rules.append(_rule_of_text(compiler, tool, tool.text_grammar, self.form))
                if not self.form.holds_text_grammars:
                    warnings.append(
                        f"tool {tool.name}: this model's calls are not held to its grammar"
                    )
                continue
            compiled = compiler.json_schema(tool.schema, strict=tool.strict)
            warnings += (f"tool {tool.name}: {warning}" for warning in compiled.warnings)
            values = _value_rules(compiler, tool) if self.form.by_parameter else {}
            warnings += _unheld_texts(tool) if self.form.texts_are_bare else []
            rules.append(ToolRule(tool, compiled.rule, values))
        built = self.form.grammar(
            rules,
            required=self.choice not in ("auto", "none"),
            parallel=self.parallel and self.choice in ("auto", "required"),
            answer=None if answer is None else answer.rule,
        )
        return CompiledCalls(compiler.lark(built.lark), built.triggers, tuple(warnings))


def render_calls(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]
) -> Sequence[Mapping[str, Any]]:
    """Return messages with earlier calls as the template reads them, where no tools are offered."""
    form = call_form(tokenizer)
    if not any(message.get("tool_calls") for message in messages):
        return messages
    if form is None:
        return _with_calls_as_text(messages)
    return [_for_template(message, form) for message in messages]


def framed_answer(
    tokenizer: Tokenizer, compiler: GrammarCompiler, prompt: Sequence[int], answer: Grammar
) -> Grammar:
    """Return the grammar of an answer with the headers that a model writes around it.

    Args:
        tokenizer: the model's tokenizer.
        compiler: compiler of the model.
        prompt: token ids of the prompt, whose end says whether the model writes a header first.
        answer: grammar of the answer's text.
    """
    form = call_form(tokenizer)
    if form is None or not form.has_headers(prompt):
        return answer
    framed = form.grammar([], required=False, parallel=False, answer=answer.rule)
    grammar = compiler.lark(framed.lark)
    return replace(grammar, rule=answer.rule, warnings=answer.warnings, schema=answer.schema)


def _rule_of_text(compiler: GrammarCompiler, tool: Tool, grammar: str, form: CallForm) -> ToolRule:
    """Rule of a tool whose only argument is a text with a grammar of its own.

    Raises:
        InvalidSchema: the grammar is not understood, or has no form inside JSON.
    """
    bare = compiler.lark(grammar).rule
    inner = compiler.lark(quoted_grammar(grammar)).rule
    [name] = tool.parameters["properties"]
    text = f'"\\"" {inner} "\\""'
    rule = f"{quoted(f'{{{json.dumps(name)}: ')} {text} {quoted('}')}"
    return ToolRule(tool, rule, {name: bare if form.texts_are_bare else text})


def _value_rules(compiler: GrammarCompiler, tool: Tool) -> dict[str, str]:
    """Rule of each parameter by itself, for forms that write parameters one by one."""
    shared = {
        name: tool.parameters[name] for name in ("$defs", "definitions") if name in tool.parameters
    }
    rules: dict[str, str] = {}
    for name, _ in parameters_in_order(tool):
        schema = tool.parameters["properties"][name]
        whole = {**schema, **shared} if isinstance(schema, Mapping) else schema
        rules[name] = compiler.json_schema(whole, strict=tool.strict).rule
    return rules


def _unheld_texts(tool: Tool) -> list[str]:
    """Say which text parameters have a pattern or format, which bare text does not keep."""
    properties = tool.parameters.get("properties") or {}
    return [
        f"tool {tool.name}: {keyword} of {name} is not held, since the model writes it as bare text"
        for name, schema in properties.items()
        if isinstance(schema, Mapping) and schema.get("type") == "string"
        for keyword in ("pattern", "format")
        if keyword in schema
    ]


def _for_template(message: Mapping[str, Any], form: CallForm) -> dict[str, Any]:
    """Return a message with calls as the template reads them."""
    fields = dict(message)
    if message.get("tool_call_id") is not None:
        fields["tool_call_id"] = _template_id(message["tool_call_id"], form)
    if not message.get("tool_calls"):
        fields.pop("tool_calls", None)
        return fields
    fields["content"] = message.get("content") or ""
    keeps_text = re.search(r"arguments\S* is string", form.template) is not None
    fields["tool_calls"] = [
        _call_for_template(call, form, keeps_text) for call in message["tool_calls"]
    ]
    return fields


def _call_for_template(call: Any, form: CallForm, keeps_text: bool) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidInput(
            f"an entry of tool_calls must have a function with a name, found {call!r:.200}"
        )
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str) and not keeps_text:
        arguments = _parse_arguments(function["name"], arguments)
    result = {
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }
    if call.get("id") is not None:
        result["id"] = _template_id(call["id"], form)
    return result


def _parse_arguments(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidInput(
            f"the arguments of an earlier call of {name} are no JSON object: {text:.100}"
        )
    return value


def _template_id(call_id: Any, form: CallForm) -> str:
    """Return an id in the form that the template accepts; always the same for the same id."""
    prefix, length = form.id_format
    if prefix or re.fullmatch(rf"[a-zA-Z0-9]{{{length}}}", str(call_id)):
        return str(call_id)
    return hashlib.sha256(str(call_id).encode()).hexdigest()[:length]


def _described(
    messages: Sequence[Mapping[str, Any]], definitions: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return messages for a template without tools: all about them is text."""
    listed = "\n".join(json.dumps(each, ensure_ascii=False) for each in definitions)
    instructions = _INSTRUCTIONS.format(definitions=listed)
    result = _with_calls_as_text(messages)
    if result and result[0].get("role") == "system":
        result[0]["content"] = f"{result[0]['content']}\n\n{instructions}"
    else:
        result.insert(0, {"role": "system", "content": instructions})
    return result


def _with_calls_as_text(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with calls and their results as text.

    Results become a message of the user, and several in a row one message, since many templates
    want the roles to alternate.
    """
    result: list[dict[str, Any]] = []
    for message in messages:
        fields = {name: value for name, value in message.items() if name != "tool_calls"}
        text = message.get("content") or ""
        if message.get("tool_calls"):
            calls = [_call_as_text(call) for call in message["tool_calls"]]
            fields["content"] = "\n".join([text, *calls] if text else calls)
        if message.get("role") == "tool":
            content = f"<tool_response>\n{text}\n</tool_response>"
            if result and result[-1].get("about_tools"):
                result[-1]["content"] += f"\n{content}"
                continue
            fields = {"role": "user", "content": content, "about_tools": True}
        result.append(fields)
    for fields in result:
        fields.pop("about_tools", None)
    return result


def _call_as_text(call: Any) -> str:
    function = call["function"]
    given = function.get("arguments") or "{}"
    arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    name = json.dumps(function["name"])
    return f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'

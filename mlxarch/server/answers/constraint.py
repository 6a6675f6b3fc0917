"""Form that a request gives to its answers, as a constraint on their tokens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from mlxarch.errors import InvalidSchema
from mlxarch.generation.answer_form import constrain
from mlxarch.language_model import LanguageModel
from mlxarch.server.http.errors import ApiError, invalid
from mlxarch.structured_output.matcher import Grammar, Matcher
from mlxarch.tool_calls.use import CompiledCalls, ToolUse, framed_answer

FORMS = ("text", "json_object", "json_schema")


@dataclass(frozen=True)
class AnswerSchema:
    """Form of an answer.

    Attributes:
        schema: JSON schema; None for any JSON object.
        strict: whether a keyword that no grammar can hold is refused, rather than warned of.
        param: path of the field that asks for it.
    """

    schema: Mapping[str, Any] | None
    strict: bool
    param: str


def schema_of(kind: str, schema: object, *, strict: bool, param: str) -> AnswerSchema | None:
    """Form of the answer that a request asks for; None for free text.

    Raises:
        ApiError: another kind, or a schema that is none.
    """
    if kind == "text":
        return None
    if kind == "json_object":
        return AnswerSchema(None, strict=False, param=param)
    if kind != "json_schema":
        raise invalid(f"{param}.type must be one of {', '.join(FORMS)}", f"{param}.type")
    if not isinstance(schema, dict):
        raise invalid(f"{param} needs a schema, which is an object", param)
    return AnswerSchema(schema, strict, param)


@dataclass(frozen=True)
class Constraint:
    """Constraint on the tokens of an answer.

    Attributes:
        model: the model that answers.
        answer: compiled form of an answer without calls; None for free text.
        calls: compiled form of an answer that may call tools; None without tools.
    """

    model: LanguageModel
    answer: Grammar | None
    calls: CompiledCalls | None

    def matcher(self, prompt: Sequence[int]) -> Matcher | None:
        """New matcher for an answer to a prompt; None if every token may follow."""
        tokenizer = self.model.tokenizer
        if self.calls is not None:
            return constrain(tokenizer, prompt, self.calls.grammar, self.calls.triggers)
        if self.answer is None:
            return None
        framed = framed_answer(tokenizer, self.model.grammars, prompt, self.answer)
        return constrain(tokenizer, prompt, framed)

    def violations(self, text: str) -> list[str]:
        """Sentences about what a complete answer breaks, of what no grammar can hold."""
        if self.answer is None or not self.answer.is_json:
            return []
        try:
            return list(self.answer.violations(msgspec.json.decode(text)))
        except msgspec.MsgspecError:
            return ["the answer is no complete JSON"]


def compile_constraint(
    model: LanguageModel,
    form: AnswerSchema | None,
    use: ToolUse | None,
    warn: Callable[[str], None],
) -> Constraint:
    """Compile the form of an answer.

    Raises:
        ApiError: a schema is refused; the message names the keyword and its path.
    """
    answer: Grammar | None = None
    if form is not None:
        try:
            if form.schema is None:
                answer = model.grammars.json_object()
            else:
                answer = model.grammars.json_schema(form.schema, strict=form.strict)
        except InvalidSchema as error:
            raise _refusal(error, form.param) from None
        for warning in answer.warnings:
            warn(warning)
    if use is None:
        return Constraint(model, answer, None)
    try:
        calls = use.compile(model.grammars, answer)
    except InvalidSchema as error:
        raise _refusal(error, "tools") from None
    for warning in (*use.warnings, *calls.warnings):
        warn(warning)
    return Constraint(model, answer, calls)


def _refusal(error: InvalidSchema, param: str) -> ApiError:
    return invalid(str(error), param, "invalid_schema")

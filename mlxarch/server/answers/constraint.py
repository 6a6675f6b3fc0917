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
        grammar: compiled grammar.
    """

    model: LanguageModel
    grammar: Grammar

    def matcher(self, prompt: Sequence[int]) -> Matcher:
        """New matcher for an answer to a prompt."""
        return constrain(self.model.tokenizer, prompt, self.grammar)

    def violations(self, text: str) -> list[str]:
        """Sentences about what a complete answer breaks, of what no grammar can hold."""
        if not self.grammar.is_json:
            return []
        try:
            return list(self.grammar.violations(msgspec.json.decode(text)))
        except msgspec.MsgspecError:
            return ["the answer is no complete JSON"]


def compile_constraint(
    model: LanguageModel, form: AnswerSchema | None, warn: Callable[[str], None]
) -> Constraint | None:
    """Compile the form of an answer; None for free text.

    Raises:
        ApiError: the schema is refused; the message names the keyword and its path.
    """
    if form is None:
        return None
    try:
        if form.schema is None:
            grammar = model.grammars.json_object()
        else:
            grammar = model.grammars.json_schema(form.schema, strict=form.strict)
    except InvalidSchema as error:
        raise _refusal(error, form.param) from None
    for warning in grammar.warnings:
        warn(warning)
    return Constraint(model, grammar)


def _refusal(error: InvalidSchema, param: str) -> ApiError:
    return invalid(str(error), param, "invalid_schema")

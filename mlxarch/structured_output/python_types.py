"""Schemas from Python types, and answers as values of these types."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from mlxarch.errors import InvalidSchema


@dataclass(frozen=True)
class AnswerType:
    """JSON schema of an answer, and the function that reads it.

    Attributes:
        schema: the JSON schema.
        parse: text of a complete answer -> value; raises ``msgspec.MsgspecError`` for another text.
    """

    schema: Mapping[str, Any]
    parse: Callable[[str], Any]


def answer_type(schema: Any) -> AnswerType:
    """Return the JSON schema for what a caller gave.

    Args:
        schema: a JSON schema; or a ``msgspec.Struct``, a dataclass or another type that msgspec
            converts, whose schema is derived and of which the parsed answer is an instance.

    Raises:
        InvalidSchema: neither of them.
    """
    if isinstance(schema, Mapping):
        return AnswerType(schema, msgspec.json.decode)
    try:
        derived = msgspec.json.schema(schema)
    except Exception as problem:  # msgspec passes on what a type's own methods raise
        raise InvalidSchema(
            "schema must be a JSON schema (a dict), a msgspec.Struct, a dataclass or another type "
            f"of msgspec, found {schema!r:.200} ({problem})"
        ) from None
    return AnswerType(derived, lambda text: msgspec.json.decode(text, type=schema))

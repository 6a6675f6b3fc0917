"""Check of a finished answer against the keywords of a JSON schema that its grammar left out.

Patterns and formats are not evaluated: Python's regular expressions can take exponential time, and
a schema may come from anywhere. Where a result depends on one, it stays undecided.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from mlxarch.errors import MlxArchError
from mlxarch.structured_output.schema import MAX_DEPTH, resolve

_MAX_STEPS = 100_000
_TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
}


class _TooLarge(MlxArchError):
    """The check takes too many steps."""


def violations(answer: Any, schema: Mapping[str, Any] | bool) -> list[str]:
    """Say where an answer breaks its schema, as far as can be decided cheaply.

    Args:
        answer: the parsed answer.
        schema: the JSON schema as given.

    Returns:
        A sentence for each broken keyword; empty if none is known to be broken.
    """
    check = _Check(schema if isinstance(schema, Mapping) else {})
    try:
        return list(dict.fromkeys(check.broken(answer, schema, "$")))
    except (_TooLarge, RecursionError):
        return []


class _Check:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._steps = 0

    def broken(self, value: Any, schema: Any, path: str, depth: int = 0) -> Iterator[str]:
        """Say which keywords a value breaks."""
        self._steps += 1
        if self._steps > _MAX_STEPS or depth > 4 * MAX_DEPTH:
            raise _TooLarge
        schema = resolve(schema, self._root)
        if schema is False:
            yield f"{path} must not exist"
        if not isinstance(schema, Mapping):
            return
        for keyword, given in schema.items():
            if self._holds(keyword, given, value, schema, depth) is False:
                yield f"{path} breaks {keyword}"
        for inner, subschema, name in _children(value, schema):
            yield from self.broken(inner, subschema, f"{path}{name}", depth + 1)

    def _valid(self, value: Any, schema: Any, depth: int) -> bool | None:
        """Whether a value matches a schema; None if a pattern or a format would have to say."""
        if next(self.broken(value, schema, "", depth + 1), None) is not None:
            return False
        return None if _mentions_text_rules(resolve(schema, self._root)) else True

    def _holds(
        self, keyword: str, given: Any, value: Any, schema: Mapping[str, Any], depth: int
    ) -> bool | None:
        """Whether a value keeps one keyword; None if it is unknown or not decided."""
        if keyword in _SIMPLE:
            return _SIMPLE[keyword](given, value)
        if keyword == "allOf":
            return _all(self._valid(value, each, depth) for each in given)
        if keyword == "anyOf":
            return _count([self._valid(value, each, depth) for each in given], 1, math.inf)
        if keyword == "oneOf":
            return _count([self._valid(value, each, depth) for each in given], 1, 1)
        if keyword == "not":
            valid = self._valid(value, given, depth)
            return None if valid is None else not valid
        if keyword == "if":
            valid = self._valid(value, given, depth)
            branch = schema.get("then" if valid else "else", True)
            return None if valid is None else self._valid(value, branch, depth)
        if keyword == "contains" and isinstance(value, list):
            found = [self._valid(each, given, depth) for each in value]
            low = schema.get("minContains", 1)
            return _count(found, low, schema.get("maxContains", math.inf))
        if keyword == "propertyNames" and isinstance(value, dict):
            return _all(self._valid(name, given, depth) for name in value)
        if keyword == "dependentSchemas" and isinstance(value, dict):
            present = [each for name, each in given.items() if name in value]
            return _all(self._valid(value, each, depth) for each in present)
        return None


def _children(value: Any, schema: Mapping[str, Any]) -> Iterator[tuple[Any, Any, str]]:
    """Items and properties of a value, with the schema and the name of each."""
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        for name, inner in value.items():
            if name in properties:
                yield inner, properties[name], f".{name}"
            elif "patternProperties" not in schema:
                yield inner, schema.get("additionalProperties", True), f".{name}"
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        rest = schema.get("items", True)
        if isinstance(rest, list):  # as before 2020-12
            first = rest
            rest = schema.get("additionalItems", True)
        for index, inner in enumerate(value):
            yield inner, first[index] if index < len(first) else rest, f"[{index}]"


def _mentions_text_rules(schema: Any) -> bool:
    text = json.dumps(schema, default=str)
    return any(f'"{word}"' in text for word in ("pattern", "format", "patternProperties", "$ref"))


def _all(results: Iterator[bool | None]) -> bool | None:
    found = list(results)
    if False in found:
        return False
    return None if None in found else True


def _count(results: list[bool | None], low: float, high: float) -> bool | None:
    """Whether the number of valid results lies between two bounds."""
    certain = results.count(True)
    possible = certain + results.count(None)
    if possible < low or certain > high:
        return False
    return True if certain >= low and possible <= high else None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _type(given: Any, value: Any) -> bool:
    names = [given] if isinstance(given, str) else given
    for name in names:
        if name in ("number", "integer"):
            if _number(value) and (name == "number" or float(value).is_integer()):
                return True
        elif isinstance(value, _TYPES.get(name, ())):
            return True
    return False


def _equal(one: Any, other: Any) -> bool:
    return _canonical(one) == _canonical(other)


def _canonical(value: Any) -> str:
    """Text that is the same for values that JSON Schema calls equal: 1 and 1.0, not 1 and true."""
    if _number(value) and float(value).is_integer():
        value = int(value)
    if isinstance(value, list):
        return f"[{','.join(map(_canonical, value))}]"
    if isinstance(value, dict):
        pairs = (f"{json.dumps(name)}:{_canonical(each)}" for name, each in sorted(value.items()))
        return f"{{{','.join(pairs)}}}"
    return json.dumps(value)


def _multiple(given: Any, value: Any) -> bool:
    if not _number(value):
        return True
    quotient = value / given
    return abs(quotient - round(quotient)) < 1e-9 * max(1, abs(quotient))


def _unique(given: Any, value: Any) -> bool:
    if given is not True or not isinstance(value, list):
        return True
    return len(set(map(_canonical, value))) == len(value)


def _required_together(given: Any, value: Any) -> bool:
    if not isinstance(value, dict):
        return True
    return all(set(names) <= value.keys() for name, names in given.items() if name in value)


_SIMPLE: dict[str, Any] = {
    "type": _type,
    "const": _equal,
    "enum": lambda given, value: any(_equal(each, value) for each in given),
    "minimum": lambda given, value: not _number(value) or value >= given,
    "maximum": lambda given, value: not _number(value) or value <= given,
    "exclusiveMinimum": lambda given, value: not _number(value) or value > given,
    "exclusiveMaximum": lambda given, value: not _number(value) or value < given,
    "multipleOf": _multiple,
    "minLength": lambda given, value: not isinstance(value, str) or len(value) >= given,
    "maxLength": lambda given, value: not isinstance(value, str) or len(value) <= given,
    "minItems": lambda given, value: not isinstance(value, list) or len(value) >= given,
    "maxItems": lambda given, value: not isinstance(value, list) or len(value) <= given,
    "uniqueItems": _unique,
    "required": lambda given, value: not isinstance(value, dict) or set(given) <= value.keys(),
    "minProperties": lambda given, value: not isinstance(value, dict) or len(value) >= given,
    "maxProperties": lambda given, value: not isinstance(value, dict) or len(value) <= given,
    "dependentRequired": _required_together,
}

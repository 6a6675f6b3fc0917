"""Finished answers against keywords that no grammar holds; the jsonschema package is the reference."""

from typing import Any

import jsonschema
import pytest

from mlxarch.structured_output.answer_check import violations

VALUES: list[Any] = [
    *(None, True, 0, 1, 1.0, 2.5, -3, "", "abc", "abcd", [], [1], [1, 1.0], [1, True], [[1], [1]]),
    *([1, "a", 2, "b"], {}, {"a": 1}, {"a": 1, "b": 2}, {"b": "x"}, {"long name": 1}),
    *({"a": {"a": 1}}, {"tags": ["x", "x"]}, {"tags": ["x", "y"]}, [{"k": 1}, {"k": 1}], [0, 0.0]),
]
SCHEMAS: list[Any] = [
    {"uniqueItems": True},
    {"properties": {"tags": {"uniqueItems": True}}},
    {"not": {"type": ["string", "null"]}},
    {"not": {"required": ["a"]}},
    {"not": {"const": 1}},
    {"oneOf": [{"type": "integer"}, {"minimum": 1}]},
    {"oneOf": [{"required": ["a"]}, {"required": ["b"]}, {"type": "array"}]},
    {"if": {"type": "string"}, "then": {"minLength": 4}, "else": {"not": {"type": "number"}}},
    {"if": {"required": ["a"]}, "then": {"required": ["b"]}},
    {"contains": {"type": "string"}},
    {"contains": {"const": 1}, "minContains": 2, "maxContains": 2},
    {"propertyNames": {"maxLength": 3}},
    {"dependentRequired": {"a": ["b"]}},
    {"dependentSchemas": {"a": {"minProperties": 2}}},
    {"additionalProperties": {"not": {"type": "object"}}},
    {"items": {"oneOf": [{"type": "number"}, {"const": "a"}]}},
    {"prefixItems": [{"type": "integer"}, {"not": {"type": "string"}}]},
    {"$ref": "#/$defs/n", "$defs": {"n": {"not": {"maximum": 1}}}},
    {"allOf": [{"multipleOf": 0.5}, {"anyOf": [{"exclusiveMinimum": 1}, {"enum": [0, None]}]}]},
    {"properties": {"a": False}},
    {"maxProperties": 1, "minItems": 1, "maxItems": 2, "exclusiveMaximum": 2, "maxLength": 3},
    True,
    False,
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
def test_values_are_judged_as_the_reference_does(schema: Any) -> None:
    valid = [jsonschema.Draft202012Validator(schema).is_valid(value) for value in VALUES]
    assert [not violations(value, schema) for value in VALUES] == valid


def test_most_schemas_tell_values_apart() -> None:
    mixed = [len({not violations(value, schema) for value in VALUES}) == 2 for schema in SCHEMAS]
    assert mixed.count(False) == 2  # true and false


def test_a_violation_says_where() -> None:
    schema = {"items": {"properties": {"t": {"uniqueItems": True}}}}
    assert violations([{}, {"t": [1, 1]}], schema) == ["$[1].t breaks uniqueItems"]


def test_what_depends_on_a_pattern_stays_undecided() -> None:
    assert not violations("aaaa", {"not": {"pattern": "(a+)+$"}})
    assert not violations("aaaa", {"oneOf": [{"pattern": "^a"}, {"format": "date"}]})


def test_a_check_that_takes_too_long_is_given_up() -> None:
    schema: dict[str, Any] = {"allOf": [{"$ref": "#"}, {"$ref": "#"}]}
    assert violations([1, 1], schema) == []

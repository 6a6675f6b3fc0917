"""Answers of random logits under compiled schemas, against the jsonschema package."""

import json
import re
from typing import Any

import jsonschema
import pytest
from random_answers import PADDING, make_compiler, random_answer

from mlxarch.errors import ConstraintError, InvalidSchema, UnsupportedSchema

STRINGS: list[dict[str, Any]] = [
    {},
    *({"minLength": low, "maxLength": low + more} for low in (0, 2, 7) for more in (0, 3)),
    *({"pattern": text} for text in ("^[ab]{2,4}$", "x+", r"^\d{3}-\d{4}$", "^(no|yes|né)$")),
    *({"format": name} for name in ("date", "time", "date-time", "email", "uuid", "ipv4")),
    *({"format": name} for name in ("ipv6", "hostname", "duration", "uri")),
    {"enum": ["a", 'with "quotes"', "ünï", "line\nbreak", ""]},
    {"const": "<tag>\\"},
]
NUMBERS: list[dict[str, Any]] = [
    {},
    *({"minimum": low, "maximum": low + more} for low in (-20, 0, 95) for more in (0, 5, 1000)),
    *({"exclusiveMinimum": low, "exclusiveMaximum": low + 2} for low in (-2, 0, 9)),
    {"minimum": 10**6},
    {"maximum": -3},
]
FLOATS = [{"minimum": -0.5, "maximum": 0.25}, {"exclusiveMinimum": 1.5}, {"multipleOf": 0.5}]
SCALARS: list[dict[str, Any]] = [
    *({"type": "string"} | each for each in STRINGS),
    *({"type": "integer"} | each for each in [*NUMBERS, {"multipleOf": 7}]),
    *({"type": "number"} | each for each in [*NUMBERS, *FLOATS]),
    {"type": "boolean"},
    {"type": "null"},
    {"const": {"a": [1, None, "x"]}},
    {"enum": [1, "1", None, [], {"k": False}]},
]
SHORT: list[dict[str, Any]] = [
    {"type": "integer", "minimum": 0, "maximum": 99},
    {"type": ["string", "null"], "maxLength": 4},
    {"type": "boolean"},
    {"enum": ["red", "green", 3]},
    {"anyOf": [{"const": 1}, {"type": "array", "items": {"type": "null"}, "maxItems": 2}]},
]
ARRAYS: list[dict[str, Any]] = [
    *(
        {"type": "array", "items": item, "minItems": low, "maxItems": low + 2}
        for item in SHORT
        for low in (0, 1, 3)
    ),
    *(
        {"type": "array", "prefixItems": [one, two], "items": False}
        for one in SHORT
        for two in SHORT
    ),
    {"type": "array", "prefixItems": SHORT[:2], "minItems": 2, "items": SHORT[2], "maxItems": 4},
    {"type": "array", "items": [SHORT[0]], "additionalItems": False},
]


def an_object(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False} | more


OBJECTS: list[dict[str, Any]] = [
    *(an_object({"a": one, "b": two}, required=["a"]) for one in SHORT for two in SHORT),
    *(an_object({"a": one, "b": one}, required=["b", "a"]) for one in SHORT),
    *(an_object({"deep": an_object({"deeper": one}, required=["deeper"])}) for one in SHORT),
    *(
        {"type": "object", "patternProperties": {"^[xy]{1,2}$": one}, "additionalProperties": False}
        for one in SHORT
    ),
    *(
        {"type": "object", "additionalProperties": one, "minProperties": low, "maxProperties": 3}
        for one in SHORT
        for low in (0, 2)
    ),
]
COMBINED: list[dict[str, Any]] = [
    *({"anyOf": [one, an_object({"k": two})]} for one in SHORT for two in SHORT[:3]),
    *({"allOf": [{"type": "integer"}, {"minimum": low}, {"maximum": 30}]} for low in (1, 29)),
    {"allOf": [an_object({"a": SHORT[0]}), {"required": ["a"]}]},
    {"oneOf": [{"type": "string", "maxLength": 3}, {"type": "boolean"}, {"type": "null"}]},
    {
        "oneOf": [
            an_object({"kind": {"const": kind}, "v": SHORT[index]}, required=["kind"])
            for index, kind in enumerate(("cat", "dog", "owl"))
        ]
    },
    {
        "$defs": {"leaf": {"enum": ["x", "y"]}},
        **an_object({"l": {"$ref": "#/$defs/leaf"}, "r": {"$ref": "#/$defs/leaf"}}),
    },
    {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": an_object(
                {"v": SHORT[0], "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
                required=["v", "next"],
            )
        },
    },
    {"definitions": {"a b": {"const": 5}}, "$ref": "#/definitions/a%20b"},
    {"title": "annotated", "description": "x", "default": 1, "type": "boolean", "examples": [True]},
    {"$schema": "http://json-schema.org/draft-07/schema#", "type": "null", "$comment": "c"},
]
SCHEMAS = [*SCALARS, *ARRAYS, *OBJECTS, *COMBINED]
FORMATS = jsonschema.FormatChecker(["date", "email", "ipv4", "ipv6", "uuid"])
TOKENIZERS = ("llama3", "mistral", "gemma2")


def dialect(schema: dict[str, Any]) -> type:
    old = isinstance(schema.get("items"), list) or "$schema" in schema
    return jsonschema.Draft7Validator if old else jsonschema.Draft202012Validator


def test_there_are_hundreds_of_schemas() -> None:
    assert len(SCHEMAS) > 150


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_answer_that_ends_by_itself_validates(name: str) -> None:
    tokenizer, compiler = make_compiler(name)
    ended = 0
    for seed, schema in enumerate(SCHEMAS):
        grammar = compiler.json_schema(schema, strict=True)
        assert not grammar.warnings
        answer = random_answer(tokenizer, grammar, seed)
        if answer is None:
            continue
        ended += 1
        value = json.loads(answer)
        validator = dialect(schema)(schema, format_checker=FORMATS)
        assert validator.is_valid(value), (schema, answer)
        assert "\n" not in answer  # no free whitespace
    assert ended > 0.9 * len(SCHEMAS)


def test_without_the_mask_random_answers_are_no_json() -> None:
    tokenizer, compiler = make_compiler("llama3")
    free = compiler.lark("start: /(.|\\n)*/")
    answers = [random_answer(tokenizer, free, seed) for seed in range(20)]
    with pytest.raises(ValueError, match="."):
        for answer in answers:
            json.loads(answer or "")


def test_a_mask_is_as_wide_as_the_logits_and_leaves_out_rows_without_a_token() -> None:
    tokenizer, compiler = make_compiler("mistral")
    mask = compiler.lark("start: /(.|\\n)+/").matcher().mask()
    assert mask is not None
    assert mask.shape == (tokenizer.vocab_size + PADDING,)
    assert mask.any()
    assert not mask[tokenizer.vocab_size :].any()
    assert not mask[list(tokenizer.control_ids)].any()


def test_every_end_token_may_end_a_complete_answer_and_none_an_incomplete_one() -> None:
    tokenizer, compiler = make_compiler("llama3")
    matcher = compiler.regex("a+").matcher()
    first = matcher.mask()
    assert first is not None and not first[list(tokenizer.eos_ids)].any()
    matcher.consume(tokenizer.encode("a", add_special_tokens=False)[0])
    second = matcher.mask()
    assert second is not None and second[list(tokenizer.eos_ids)].all()
    assert len(tokenizer.eos_ids) > 1


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ({"not": {"type": "string"}}, "#/not"),
        (an_object({"t": {"type": "array", "uniqueItems": True}}), "#/properties/t/uniqueItems"),
        ({"if": {"type": "string"}, "then": {"minLength": 2}}, "#/if"),
        ({"type": "array", "items": {"contains": {"const": 1}}}, "#/items/contains"),
        ({"anyOf": [{"propertyNames": {"maxLength": 3}}]}, "#/anyOf/0/propertyNames"),
        ({"dependentRequired": {"a": ["b"]}}, "#/dependentRequired"),
        ({"unevaluatedProperties": False}, "#/unevaluatedProperties"),
        ({"oneOf": [{"type": "string"}, {"minLength": 2}]}, "#/oneOf"),
        ({"type": "string", "pattern": "(?=a)b"}, "#/pattern"),
        ({"type": "string", "format": "idn-email"}, "#/format"),
        ({"$defs": {"d": {"not": {}}}, "$ref": "#/$defs/d"}, "#/$defs/d/not"),
    ],
)
def test_a_keyword_that_no_grammar_holds_is_named_with_its_path(
    schema: dict[str, Any], path: str
) -> None:
    _, compiler = make_compiler("llama3")
    with pytest.raises(UnsupportedSchema, match=re.escape(path)) as refusal:
        compiler.json_schema(schema, strict=True)
    assert (refusal.value.path, refusal.value.keyword) == (path, path.rpartition("/")[2])
    lenient = compiler.json_schema(schema, strict=False)
    assert any(path in warning for warning in lenient.warnings)


def test_keywords_that_restrict_nothing_pass() -> None:
    _, compiler = make_compiler("llama3")
    schema = {"uniqueItems": False, "dependentRequired": {}, "unevaluatedItems": True, "then": {}}
    assert not compiler.json_schema(schema, strict=True).warnings


def test_an_unknown_keyword_gives_a_warning_and_an_x_guidance_has_no_effect() -> None:
    tokenizer, compiler = make_compiler("llama3")
    schema = {"type": "boolean", "maxLenght": 3, "x-guidance": {"whitespace_flexible": True}}
    grammar = compiler.json_schema(schema, strict=True)
    assert ["#/maxLenght" in each for each in grammar.warnings].count(True) == 1
    mask = grammar.matcher().mask()
    assert mask is not None and not mask[tokenizer.encode(" ")[-1]]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "text"},
        {"properties": ["a"]},
        {"items": 3},
        {"enum": []},
        {"type": "integer", "minimum": 3, "maximum": 2},
        {"$schema": "http://example.org/mine"},
        {"$ref": "http://example.org/remote"},
        {"const": float("nan")},
        False,
        "object",
    ],
    ids=str,
)
def test_a_schema_that_is_none_or_contradicts_itself_is_refused(schema: Any) -> None:
    _, compiler = make_compiler("llama3")
    with pytest.raises(InvalidSchema):
        compiler.json_schema(schema, strict=True)


def test_hostile_schemas_end_in_an_error() -> None:
    tokenizer, compiler = make_compiler("llama3")
    nested: dict[str, Any] = {"type": "null"}
    for _ in range(400):
        nested = {"type": "array", "items": nested}
    with pytest.raises(InvalidSchema, match="nests deeper"):
        compiler.json_schema(nested)
    with pytest.raises(InvalidSchema, match="parts"):
        compiler.json_schema({"properties": {f"p{i}": {"type": "null"} for i in range(9000)}})
    wide = {f"p{index}": {"type": "string"} for index in range(2500)}
    schema = {"type": "object", "properties": wide}
    matcher = compiler.json_schema(schema).matcher()
    with pytest.raises(ConstraintError, match="max is"):
        for token in tokenizer.encode('{"p', add_special_tokens=False):
            matcher.mask()
            matcher.consume(token)
    with pytest.raises(InvalidSchema, match="characters"):
        compiler.regex("a" * (5 << 20))


def test_regular_expressions_and_lark_grammars() -> None:
    tokenizer, compiler = make_compiler("gemma2")
    for seed in range(5):
        answer = random_answer(tokenizer, compiler.regex(r"[a-c]{3}/[0-9]+ (yes|no)"), seed)
        assert answer is not None
        assert re.fullmatch(r"[a-c]{3}/[0-9]+ (yes|no)", answer)
        answer = random_answer(
            tokenizer, compiler.lark('start: sum\nsum: /[0-9]/ ("+" sum)?'), seed
        )
        assert answer is None or re.fullmatch(r"[0-9](\+[0-9])*", answer)
    with pytest.raises(InvalidSchema):
        compiler.lark("start: nothing")
    with pytest.raises(InvalidSchema):
        compiler.regex("(?<=a)b")


def test_compiled_grammars_are_kept_and_matchers_are_independent() -> None:
    tokenizer, compiler = make_compiler("llama3")
    grammar = compiler.json_schema({"const": 12})
    assert compiler.json_schema({"const": 12}) is grammar
    one, other = grammar.matcher(), grammar.matcher()
    one.consume(tokenizer.encode("1", add_special_tokens=False)[0])
    before = grammar.matcher().mask()
    after = other.mask()
    assert before is not None and after is not None
    assert (before == after).all()
    assert (one.mask() != after).any()

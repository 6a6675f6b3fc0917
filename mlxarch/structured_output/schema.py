"""JSON schemas before compilation: keywords that a grammar cannot hold are found, with their paths.

llguidance compiles a schema to a grammar. It holds most keywords, refuses some, and ignores those
that it does not know. ``prepare`` reads the schema first, so that each keyword that would be
refused or ignored is named with the place where it stands.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from mlxarch.errors import InvalidSchema, UnsupportedSchema

MAX_DEPTH = 64
MAX_SUBSCHEMAS = 4000

_MAPS = ("properties", "patternProperties", "dependentSchemas")
_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems")
_SINGLE = (
    *("items", "additionalItems", "additionalProperties", "not", "if", "then", "else"),
    *("contains", "propertyNames", "unevaluatedItems", "unevaluatedProperties"),
)
_HELD = frozenset(
    {
        *("type", "enum", "const", "properties", "patternProperties", "additionalProperties"),
        *("required", "minProperties", "maxProperties", "items", "additionalItems", "prefixItems"),
        *("minItems", "maxItems", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
        *("multipleOf", "minLength", "maxLength", "pattern", "format", "anyOf", "allOf", "oneOf"),
        *("$ref", "$defs", "definitions", "$id", "$anchor", "$schema", "$vocabulary"),
    }
)
_ANNOTATIONS = frozenset(
    {
        *("$comment", "title", "description", "default", "examples", "deprecated", "readOnly"),
        *("writeOnly", "discriminator", "contentEncoding", "contentMediaType", "contentSchema"),
    }
)
# Keyword that no grammar of llguidance holds -> the value that says nothing
_NOT_HELD: dict[str, Any] = {
    **{"not": False, "if": None, "then": None, "else": None, "uniqueItems": False},
    **{"contains": None, "minContains": None, "maxContains": None, "propertyNames": True},
    **{"dependentRequired": {}, "dependentSchemas": {}, "dependencies": {}},
    **{"unevaluatedItems": True, "unevaluatedProperties": True},
    **{"$dynamicRef": None, "$dynamicAnchor": None, "$recursiveRef": None},
}
_DIALECTS = (
    *(f"json-schema.org/draft-0{number}/schema" for number in (4, 6, 7)),
    *(f"json-schema.org/draft/{year}/schema" for year in ("2019-09", "2020-12")),
)


@dataclass
class PreparedSchema:
    """Schema in the form that is compiled.

    Attributes:
        schema: copy of the schema without keywords that a grammar cannot hold.
        dropped: path and keyword of what was left out although it restricts the answer.
        warnings: a sentence for each keyword that has no effect on the grammar.
    """

    schema: dict[str, Any]
    dropped: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def prepare(
    schema: Mapping[str, Any] | bool, *, strict: bool, compiles: Callable[[dict[str, Any]], bool]
) -> PreparedSchema:
    """Find the keywords that a grammar cannot hold, and return the schema without them.

    Args:
        schema: the JSON schema.
        strict: refuse the schema if it has such a keyword; otherwise leave it out with a warning.
        compiles: whether llguidance compiles a schema; asked about patterns and formats.

    Raises:
        UnsupportedSchema: ``strict``, and a keyword restricts the answer that no grammar holds.
        InvalidSchema: the schema is no JSON schema, or too large.
    """
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    if not isinstance(schema, Mapping):
        raise InvalidSchema(f"a JSON schema is an object, found {type(schema).__name__}")
    reader = _SchemaReader(schema, compiles)
    prepared = PreparedSchema(reader.copy(schema, "#"), reader.dropped, reader.warnings)
    if strict and reader.dropped:
        path, keyword = reader.dropped[0]
        raise UnsupportedSchema(path, keyword)
    return prepared


class _SchemaReader:
    """One pass over a schema; targets of references are read where they stand."""

    def __init__(self, root: Mapping[str, Any], compiles: Callable[[dict[str, Any]], bool]) -> None:
        self._root = root
        self._compiles = compiles
        self._count = 0
        self.dropped: list[tuple[str, str]] = []
        self.warnings: list[str] = []

    def copy(self, schema: Any, path: str, depth: int = 0) -> Any:
        """Copy a schema without what a grammar cannot hold."""
        self._count += 1
        if depth > MAX_DEPTH or self._count > MAX_SUBSCHEMAS:
            raise InvalidSchema(
                f"the schema nests deeper than {MAX_DEPTH} levels or has more than "
                f"{MAX_SUBSCHEMAS} parts, at {path[:200]}; simplify it"
            )
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            raise InvalidSchema(f"{path} must be a schema (an object), found {schema!r:.80}")
        result = {
            keyword: value
            for keyword, value in schema.items()
            if self._keeps(schema, keyword, f"{path}/{keyword}")
        }
        for keyword in (*_MAPS, "$defs", "definitions"):
            if isinstance(inner := result.get(keyword), Mapping):
                result[keyword] = {
                    name: self.copy(each, f"{path}/{keyword}/{name}", depth + 1)
                    for name, each in inner.items()
                }
        for keyword in (*_LISTS, "items"):
            if isinstance(inner := result.get(keyword), list):
                result[keyword] = [
                    self.copy(each, f"{path}/{keyword}/{index}", depth + 1)
                    for index, each in enumerate(inner)
                ]
        for keyword in _SINGLE:
            if isinstance(inner := result.get(keyword), Mapping):
                result[keyword] = self.copy(inner, f"{path}/{keyword}", depth + 1)
        self._replace_one_of(result, path)
        return result

    def _keeps(self, schema: Mapping[str, Any], keyword: str, path: str) -> bool:
        """Whether a keyword goes into the grammar; what does not is recorded."""
        value = schema[keyword]
        if keyword in _NOT_HELD:
            if not self._says_nothing(schema, keyword):
                self._drop(path, keyword)
            return False
        if keyword in ("pattern", "format"):
            held = self._compiles({"type": "string", keyword: value})
            if not held:
                self._drop(path, keyword)
            return held
        if keyword in ("exclusiveMinimum", "exclusiveMaximum") and isinstance(value, bool):
            if value:
                self._drop(path, keyword)  # a boolean in draft 4, and a number since
            return False
        if keyword == "$schema" and not str(value).rstrip("#").endswith(_DIALECTS):
            raise InvalidSchema(
                f"{path} is {value!r:.100}, which is no known dialect; known: draft-04, -06, -07, "
                "2019-09, 2020-12"
            )
        if keyword in _HELD:
            return True
        if keyword not in _ANNOTATIONS:
            self.warnings.append(f"{path} has no effect: the keyword is not known")
        return False

    @staticmethod
    def _says_nothing(schema: Mapping[str, Any], keyword: str) -> bool:
        value = schema[keyword]
        neutral = _NOT_HELD[keyword]
        if keyword in ("if", "then", "else"):
            return "if" not in schema or not ("then" in schema or "else" in schema)
        if keyword in ("minContains", "maxContains"):
            return "contains" not in schema
        return neutral is not None and (value == neutral or (neutral is True and value == {}))

    def _replace_one_of(self, schema: dict[str, Any], path: str) -> None:
        """Write ``oneOf`` as ``anyOf`` where no value can match two branches."""
        branches = schema.get("oneOf")
        if not isinstance(branches, list):
            return
        resolved = [self._resolve(branch) for branch in branches]
        exact = all(
            _exclude_each_other(one, other)
            for index, one in enumerate(resolved)
            for other in resolved[:index]
        )
        if not exact:
            self._drop(f"{path}/oneOf", "oneOf")
        del schema["oneOf"]
        if "anyOf" not in schema:
            schema["anyOf"] = branches
        else:
            schema["allOf"] = [*schema.get("allOf", []), {"anyOf": branches}]

    def _resolve(self, schema: Any) -> Any:
        return resolve(schema, self._root)

    def _drop(self, path: str, keyword: str) -> None:
        self.dropped.append((path, keyword))
        self.warnings.append(f"{path} is not held while the model writes: no grammar has {keyword}")


def resolve(schema: Any, root: Mapping[str, Any]) -> Any:
    """Follow the local references of a schema that is nothing but a reference."""
    for _ in range(MAX_DEPTH):
        pointer = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(pointer, str) or not pointer.startswith("#"):
            break
        target: Any = root
        for part in pointer[1:].split("/")[1:]:
            part = unquote(part).replace("~1", "/").replace("~0", "~")
            target = target.get(part) if isinstance(target, Mapping) else None
        if target is None:
            break
        schema = target
    return schema


def _exclude_each_other(one: Any, other: Any) -> bool:
    """Whether no value matches both schemas, as far as types and constants show."""
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return False
    kinds = [_types(each) for each in (one, other)]
    if None not in kinds and not kinds[0] & kinds[1]:  # type: ignore[operator]
        return True
    values = [_values(each) for each in (one, other)]
    if values[0] is not None and values[1] is not None:
        return not any(value in values[1] for value in values[0])
    if kinds != [{"object"}, {"object"}]:
        return False
    shared = set(one.get("required", ())) & set(other.get("required", ()))
    return any(
        _exclude_each_other(one["properties"].get(name), other["properties"].get(name))
        for name in shared
        if isinstance(one.get("properties"), Mapping)
        and isinstance(other.get("properties"), Mapping)
    )


def _types(schema: Mapping[str, Any]) -> set[str] | None:
    given = schema.get("type")
    names = {given} if isinstance(given, str) else set(given) if isinstance(given, list) else None
    return names | {"integer"} if names and "number" in names else names


def _values(schema: Mapping[str, Any]) -> Sequence[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) else None

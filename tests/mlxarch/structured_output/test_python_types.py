"""Schemas of Python types, and answers as their instances."""

from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import pytest

from mlxarch.errors import InvalidSchema
from mlxarch.structured_output.python_types import answer_type


@dataclass
class Point:
    x: int
    label: str | None = None


class Shape(msgspec.Struct):
    kind: Literal["line", "area"]
    points: list[Point]


def test_a_type_gives_a_schema_and_reads_an_answer() -> None:
    kind = answer_type(Shape)
    assert "$defs" in kind.schema
    answer = kind.parse('{"kind": "line", "points": [{"x": 3}]}')
    assert answer == Shape("line", [Point(3)])
    with pytest.raises(msgspec.ValidationError):
        kind.parse('{"kind": "dot", "points": []}')


def test_a_schema_is_taken_as_it_is() -> None:
    kind = answer_type({"type": "array"})
    assert kind.schema == {"type": "array"}
    assert kind.parse("[1, 2.5]") == [1, 2.5]


@pytest.mark.parametrize("given", [object(), 3, "text", lambda: 1])
def test_other_things_are_refused(given: Any) -> None:
    with pytest.raises(InvalidSchema, match=r"msgspec\.Struct"):
        answer_type(given)

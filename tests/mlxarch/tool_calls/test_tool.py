"""Tools from functions and definitions."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import pytest

from mlxarch.errors import InvalidInput
from mlxarch.tool_calls.tool import Tool, call_function, tool_of, tools_of


@dataclass
class Place:
    city: str
    country: str = "DE"


def weather(
    place: Place,
    days: Annotated[int, msgspec.Meta(ge=1, le=7)],
    unit: Literal["C", "F"] = "C",
    tags: list[str] | None = None,
) -> str:
    """Tell the weather.

    It is made up.

    Args:
        place: where, a city
            with its country.
        days (int): how many days.
        unit: of the temperature.

    Returns:
        A text that is no parameter: really.
    """
    return f"{place.city} {days} {unit} {tags}"


def test_a_function_gives_name_description_and_schema() -> None:
    tool = tool_of(weather)
    assert tool.name == "weather"
    assert tool.description == "Tell the weather.\n\nIt is made up."
    properties = tool.parameters["properties"]
    assert tool.parameters["required"] == ["place", "days"]
    assert properties["place"]["description"] == "where, a city with its country."
    assert properties["days"] == {
        "description": "how many days.",
        "type": "integer",
        "minimum": 1,
        "maximum": 7,
    }
    assert properties["unit"]["enum"] == ["C", "F"]
    assert "description" not in properties["tags"]
    assert tool.parameters["$defs"]["Place"]["required"] == ["city"]
    assert tool.schema["additionalProperties"] is False
    assert tool.definition["function"]["name"] == "weather"


def test_a_function_is_called_with_values_of_its_types() -> None:
    tool = tool_of(weather)
    assert call_function(tool, {"place": {"city": "Bonn"}, "days": 2}) == "Bonn 2 C None"
    with pytest.raises(InvalidInput, match="wrong type"):
        call_function(tool, {"place": {"city": "Bonn"}, "days": 9})
    with pytest.raises(InvalidInput, match="no function"):
        call_function(Tool("x"), {})


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_definition_is_taken_with_or_without_its_outer_object(wrapped: bool) -> None:
    function = {"name": "f", "description": "d", "parameters": {"properties": {}}, "strict": True}
    tool = tool_of({"type": "function", "function": function} if wrapped else function)
    assert (tool.name, tool.description, tool.strict) == ("f", "d", True)
    assert tool_of(tool) is tool


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"name": "two words"}, "letters, digits"),
        ({"description": "nameless"}, "must have a name"),
        ({"type": "web_search", "name": "x"}, "of type function"),
        ({"name": "f", "parameters": {"type": "array"}}, "of type object"),
        ({"name": "f", "parameters": []}, None),
        ({"name": "f", "parameters": [1]}, "JSON schema"),
        (3, "a function, a definition"),
        (lambda x: x, "letters, digits|no annotation"),
        (print, "letters, digits|no annotation|by name only|signature"),
    ],
)
def test_what_is_no_tool_is_refused(given: Any, reason: str | None) -> None:
    if reason is None:
        assert tool_of(given).parameters == {}
        return
    with pytest.raises(InvalidInput, match=reason):
        tool_of(given)


def test_lists_of_tools_are_checked() -> None:
    assert tools_of(None) == ()
    with pytest.raises(InvalidInput, match="two tools"):
        tools_of([Tool("a"), {"name": "a"}])
    with pytest.raises(InvalidInput, match="a list"):
        tools_of(Tool("a"))  # type: ignore[arg-type]

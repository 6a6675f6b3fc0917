"""JSON bodies: limits, and complaints that name the field."""

import time

import pytest

from mlxarch.server.api.fields import Count, Strict
from mlxarch.server.http.body import decode_json, read_body
from mlxarch.server.http.context import RequestContext
from mlxarch.server.http.errors import ApiError


class Leaf(Strict):
    value: Count = 1


class Root(Strict):
    leaves: list[Leaf] = []
    name: str | None = None


def context(body: bytes) -> RequestContext:
    return RequestContext("openai", "req", time.monotonic(), body)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"nul", b"{}x", b'{"a": NaN}', b'{"a": Infinity}', b"\xff\xfe", b'"\\ud800"',
        b"[" * 100_000, b'{"a":' * 100_000, b"[" * 70 + b"]" * 70, b'{"a": 1e999}',
    ],
)  # fmt: skip
def test_what_is_no_json_or_too_deep_is_refused(body):
    with pytest.raises(ApiError) as refusal:
        read_body(context(body), Root, lenient=True)
    assert refusal.value.status == 400


def test_the_depth_that_is_allowed_is_read():
    assert decode_json(b"[" * 64 + b"]" * 64)
    with pytest.raises(ApiError, match="64 levels"):
        decode_json(b"[" * 66 + b"]" * 66)


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        (b'{"leaves": [{}, {"value": 0}]}', "leaves[1].value", "invalid_value"),
        (b'{"leaves": [{"x": 0}]}', "leaves[0].x", "unknown_parameter"),
        (b'{"y": 0}', "y", "unknown_parameter"),
        (b'{"name": 5}', "name", "invalid_value"),
        (b"[]", None, None),
    ],
)
def test_a_complaint_names_the_field(body, param, code):
    with pytest.raises(ApiError) as refusal:
        read_body(context(body), Root, lenient=False)
    assert refusal.value.param == param
    if code:
        assert refusal.value.code == code


def test_unknown_fields_become_warnings_on_a_lenient_server():
    given = context(b'{"leaves": [{"value": 2, "x": 1}], "y": 0}')
    body = read_body(given, Root, lenient=True)
    assert body.leaves[0].value == 2
    assert [warning.split()[0] for warning in given.warnings] == ["leaves[0].x", "y"]
    with pytest.raises(ApiError, match="name"):
        read_body(context(b'{"z": 1, "name": 5}'), Root, lenient=True)

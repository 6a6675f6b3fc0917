"""JSON bodies: decoding within limits, and validation against typed structs.

Every complaint names the field. A field that is not known is an error; on a lenient server it is
left out, and named in a warning.
"""

import re
from typing import Any, TypeVar

import msgspec

from mlxarch.server.http.context import RequestContext
from mlxarch.server.http.errors import ApiError, invalid
from mlxarch.server.settings import MAX_JSON_DEPTH

T = TypeVar("T")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*?)`(?: - at `\$(.*)`)?$", re.DOTALL)
_PLACE = re.compile(r"^(.*) - at `\$\.?(.*)`$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`$")
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]")
_MAX_UNKNOWN = 100  # unknown fields that are left out of one request


def decode_json(body: bytes) -> Any:
    """Decode a JSON body.

    Raises:
        ApiError: it is not JSON, or nests deeper than ``MAX_JSON_DEPTH``.
    """
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise _too_deep() from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(f"the body is no valid JSON: {error}") from None
    if _is_deeper(value, MAX_JSON_DEPTH):
        raise _too_deep()
    return value


def read_body(context: RequestContext, kind: type[T], *, lenient: bool) -> T:
    """Decode and validate the body of a request.

    Args:
        kind: struct with ``forbid_unknown_fields``.
        lenient: leave out unknown fields, with a warning each.

    Raises:
        ApiError: 400 that names the field.
    """
    return validate(decode_json(context.body), kind, context, lenient=lenient)


def validate(
    value: Any, kind: type[T], context: RequestContext, *, lenient: bool, place: str = ""
) -> T:
    """Convert a decoded JSON value to a struct; ``place`` is its path in the body."""
    for _ in range(_MAX_UNKNOWN):
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            message = str(error)
            unknown = _UNKNOWN.match(message)
            if unknown is None:
                raise _validation_error(message, place) from None
            path = _join(place, (unknown[2] or "") + "." + unknown[1])
            if not lenient or not _remove(value, unknown[2] or "", unknown[1]):
                raise invalid(
                    f"{path} is not a field that this server knows; leave it out, or start the "
                    "server with --lenient",
                    path,
                    "unknown_parameter",
                ) from None
            context.warn(f"{path} is not known and was ignored")
    raise invalid(f"more than {_MAX_UNKNOWN} fields are not known")


def _validation_error(message: str, place: str) -> ApiError:
    found = _PLACE.match(message)
    text = message if found is None else found[1]
    path = place if found is None else _join(place, found[2])
    if missing := _MISSING.match(text):
        path = f"{path}.{missing[1]}" if path else missing[1]
        return invalid(f"{path} is missing", path, "missing_required_parameter")
    if found is None:
        return invalid(message, place or None)
    return invalid(f"{path}: {found[1]}", path, "invalid_value")


def _join(place: str, path: str) -> str:
    path = path.removeprefix("$").removeprefix(".")
    if not place or not path:
        return place + path
    return place + path if path.startswith("[") else f"{place}.{path}"


def _remove(value: Any, path: str, name: str) -> bool:
    """Delete a field of a nested JSON value; False if the path cannot be followed."""
    try:
        for key, index in _STEP.findall(path):
            value = value[key] if key else value[int(index)]
        del value[name]
    except (KeyError, IndexError, TypeError):
        return False
    return True


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether a decoded value nests deeper than a number of levels."""
    layer = [value]
    for _ in range(levels + 1):
        children: list[Any] = []
        for item in layer:
            if isinstance(item, dict):
                children += [child for child in item.values() if isinstance(child, dict | list)]
            elif isinstance(item, list):
                children += [child for child in item if isinstance(child, dict | list)]
        if not children:
            return False
        layer = children
    return True


def _too_deep() -> ApiError:
    return invalid(f"the body nests deeper than {MAX_JSON_DEPTH} levels")

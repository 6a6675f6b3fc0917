"""Requests of the command line to a running server."""

import json
import os
import urllib.error
import urllib.request
from typing import Any

import click

from mlxarch.errors import MlxArchError

DEFAULT_SERVER = "http://127.0.0.1:8000"

server_option = click.option(
    "--server",
    "address",
    metavar="URL",
    envvar="MLXARCH_SERVER",
    show_envvar=True,
    default=DEFAULT_SERVER,
    help=f"Address of the server (default: {DEFAULT_SERVER})",
)


class ServerUnreachable(MlxArchError):
    """No server answers at the address, or it refuses the request."""


def ask_server(address: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """Send a request to a server and return its JSON answer; POST if there is a body.

    Raises:
        ServerUnreachable: there is no server, or it refuses; the message has its reason.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("MLXARCH_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(address.rstrip("/") + path, data, headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read())
    except urllib.error.HTTPError as error:
        raise ServerUnreachable(f"{address} refuses: {_reason(error.read())}") from None
    except (OSError, ValueError) as error:
        raise ServerUnreachable(
            f"no server answers at {address} ({error}); start one with `mlxarch serve MODEL`, or "
            "name it with --server"
        ) from None


def _reason(body: bytes) -> str:
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return "the answer is not one of mlxarch"

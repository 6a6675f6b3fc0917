"""``mlxarch ps``: list the loaded models of a running server."""

from datetime import UTC, datetime

import click

from mlxarch.cli.options import json_option
from mlxarch.cli.output import print_json, print_stderr, print_table
from mlxarch.cli.server_client import ask_server, server_option
from mlxarch.progress import format_size

_YEAR = 365 * 86400


@click.command("ps")
@server_option
@json_option
def ps_command(address: str, as_json: bool) -> None:
    """List the loaded models of a running server.

    Each with its memory, the requests that use it, and the time until it is unloaded.
    """
    models = ask_server(address, "/api/ps")["models"]
    if as_json:
        print_json(models)
        return
    if not models:
        print_stderr("no model is loaded")
        return
    print_table(
        (
            model["name"],
            format_size(model["size_vram"]),
            f"{model['context_length']} tokens",
            f"{model['users']} requests",
            _time_left(model["expires_at"]),
        )
        for model in models
    )


def _time_left(until: str) -> str:
    seconds = (datetime.fromisoformat(until) - datetime.now(UTC)).total_seconds()
    if seconds > _YEAR:
        return "kept"
    return f"unloaded in {max(0, round(seconds))} s"

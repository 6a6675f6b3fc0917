"""``mlxarch stop``: unload models of a running server."""

import click

from mlxarch.cli.output import print_stderr
from mlxarch.cli.server_client import ask_server, server_option


@click.command("stop")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@server_option
def stop_command(models: tuple[str, ...], address: str) -> None:
    """Unload models of a running server.

    Requests that run go on until they end. The server itself keeps running, and loads a model again
    when a request names it.
    """
    for name in models:
        ask_server(address, "/api/generate", {"model": name, "keep_alive": 0})
        print_stderr(f"{name}: unloaded")

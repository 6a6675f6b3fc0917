"""``mlxarch rm``: remove installed models."""

import sys

import click

from mlxarch.cli import options
from mlxarch.cli.output import is_terminal, print_stderr
from mlxarch.errors import Declined
from mlxarch.progress import format_size


@click.command("rm")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@options.yes_option
@click.option(
    "--hub", is_flag=True, help="Remove the copy in the Hub's cache, shared with other programs."
)
def rm_command(models: tuple[str, ...], yes: bool, hub: bool) -> None:
    """Remove models that mlxarch created.

    Other folders are never removed.
    """
    from mlxarch.store import obtain as store

    if not yes and not is_terminal(sys.stdin):
        raise click.UsageError("nobody is there to be asked: --yes removes without asking")
    for name in models:

        def confirm(size: int, name: str = name) -> bool:
            return yes or click.confirm(f"Remove {name}, {format_size(size)}?", err=True)

        try:
            freed = store.remove(name, from_hub_cache=hub, confirm=confirm)
            print_stderr(f"{name}: {format_size(freed)} freed")
        except Declined as declined:
            print_stderr(str(declined))

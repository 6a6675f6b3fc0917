"""``mlxarch verify``: check the files of a model against its receipt."""

from pathlib import Path

import click

from mlxarch.cli.options import json_option
from mlxarch.cli.output import print_json, print_line, print_stderr
from mlxarch.errors import InvalidInput, ModelNotFound
from mlxarch.store.verify import verify


@click.command("verify")
@click.argument("model", metavar="MODEL")
@json_option
def verify_command(model: str, as_json: bool) -> None:
    """Check the files of a model against its receipt.

    MODEL is a folder, or the name of a model that mlxarch created on this machine. Changed,
    missing and additional files are listed; the exit code is 1 if there are any.
    """
    folder = _find_folder(model)
    problems = verify(folder)
    if as_json:
        print_json({"folder": str(folder), "problems": problems})
    elif not problems:
        print_line(f"{folder}: every file is as it was made")
    for problem in problems:
        print_stderr(f"{folder}: {problem}")
    if problems:
        raise click.exceptions.Exit(1)


def _find_folder(name: str) -> Path:
    """Find a folder by its path or by the name of its model.

    Raises:
        ModelNotFound: there is neither such a folder nor such a model.
        InvalidInput: several models have the name.
    """
    if Path(name).is_dir():
        return Path(name)
    from mlxarch.store.names import find_copies

    copies = find_copies(name)
    if not copies:
        raise ModelNotFound(
            f"{name} is neither a folder nor a model here; "
            "`mlxarch list --installed` shows which are"
        )
    if len(copies) > 1:
        names = " or ".join(model.name for model in copies)
        raise InvalidInput(f"{name} may be {names}; name one of them")
    return copies[0].path

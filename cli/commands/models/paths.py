"""``mlxarch paths``: the folders that mlxarch uses."""

import os
import sys

import click

from mlxarch.cli.options import json_option
from mlxarch.cli.output import print_json, print_table


@click.command("paths")
@json_option
def paths_command(as_json: bool) -> None:
    """Print the folders that mlxarch uses."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from mlxarch.system import paths

    found = {
        "models": str(paths.models()),
        "config": str(paths.config()),
        "cache": str(paths.cache()),
        "state": str(paths.state()),
        "hub": HF_HUB_CACHE,
        "python": sys.executable,
    }
    if extra := os.environ.get("MLXARCH_MODELS"):
        found["more models"] = extra
    if as_json:
        print_json(found)
    else:
        print_table([(f"{name}:", path) for name, path in found.items()])

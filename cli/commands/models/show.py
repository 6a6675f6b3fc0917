"""``mlxarch show``: properties of a model, and its receipt."""

import os
from typing import Any

import click

from mlxarch.cli import options
from mlxarch.cli.output import print_json, print_line, print_table
from mlxarch.cli.receipt_lines import receipt_lines
from mlxarch.progress import format_size


@click.command("show")
@click.argument("model", required=False)
@options.model_option
@options.json_option
def show_command(model: str | None, model_flag: str | None, as_json: bool) -> None:
    """Show the properties of a model without downloading it.

    For a model that mlxarch created on this machine, the receipt too: how it was quantized, and
    how far it diverges from its source.
    """
    from mlxarch.checkpoint.receipt import read_receipt
    from mlxarch.store import obtain as store

    name = options.resolve_model_name(model_flag, model)
    properties = store.describe(name)
    is_folder = os.path.isdir(name)
    copies = properties["installed"]
    folders: list[str] = [name] if is_folder else [copy["path"] for copy in copies]
    receipts = {folder: receipt for folder in folders if (receipt := read_receipt(folder))}
    if as_json:
        print_json(properties | {"receipts": receipts})
        return
    hidden = {"installed", "sources"} if is_folder else {"installed"}
    rows = [
        (f"{key.removesuffix('_bytes')}:", _format_property(key, value))
        for key, value in properties.items()
        if key not in hidden
    ]
    for copy in copies:
        rows.append(("here:", f"{copy['name']}, {format_size(copy['bytes'])}, {copy['path']}"))
    if not copies and not is_folder:
        rows.append(("here:", "no"))
    print_table(rows)
    for folder, receipt in receipts.items():
        print_line(f"\nThe receipt in {folder}:")
        print_table(receipt_lines(receipt))


def _format_property(key: str, value: Any) -> str:
    match key, value:
        case "parameters" | "active", int():
            return f"{value:,}"
        case "source_bytes", int():
            return format_size(value)
        case "bytes", dict():
            return ", ".join(
                f"{format_size(count)} at {bits} bits" for bits, count in value.items()
            )
        case _, dict():
            return ", ".join(f"{name} {held}" for name, held in value.items()) or "-"
        case _, list():
            return ", ".join(map(str, value)) or "-"
        case _, bool():
            return "yes" if value else "no"
    return "-" if value is None else str(value)

"""``mlxarch compare``: architectures side by side, from their configs."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlxarch.cli.options import json_option
from mlxarch.cli.output import print_json, print_line, print_stderr, print_table

if TYPE_CHECKING:
    from mlxarch.inspection.compare import InspectedModel


@click.command("compare")
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@json_option
@click.option("--markdown", is_flag=True, help="Print Markdown, a row for each model.")
@click.option(
    "--svg",
    type=click.Path(dir_okay=False, path_type=Path),
    help="SVG drawing of the block diagrams (default: none)",
)
def compare_command(
    models: tuple[str, ...], as_json: bool, markdown: bool, svg: Path | None
) -> None:
    """Compare architectures by their configs.

    MODEL is a short name, a config.json, a folder or a repository of the Hub; without one, the
    whole catalog is compared. No weights are downloaded.
    """
    if as_json and markdown:
        raise click.UsageError("--json and --markdown exclude each other")
    from mlxarch.system.backend import require_backend

    require_backend()
    from mlxarch.hub import catalog
    from mlxarch.inspection import compare

    inspected = [_inspect(name) for name in models] or [
        *map(compare.inspect_model, catalog.entries())
    ]
    if svg:
        svg.write_text(compare.to_svg(inspected), encoding="utf-8")
        print_stderr(f"{svg}: {len(inspected)} drawn")
    if as_json:
        print_json([compare.to_json(model) for model in inspected])
    elif markdown:
        page = compare.to_markdown(inspected) if models else compare.architectures_page(inspected)
        print_line(page.rstrip("\n"))
    elif not svg:
        width = shutil.get_terminal_size().columns
        for rows in _split_columns(compare.comparison_table(inspected), width):
            print_table(rows)
            print_line()
        if footnote := compare.footnote(inspected):
            print_stderr(footnote, dim=True)
        for model in inspected:
            for note in compare.published_differences(model):
                print_stderr(note, dim=True)


def _inspect(name: str) -> "InspectedModel":
    """Inspect a model by any name; a copy on this machine is looked at before the Hub is asked."""
    from mlxarch.inspection import compare
    from mlxarch.store.names import find_local_copy, resolve_name

    if name.endswith(".json") and Path(name).is_file():
        return compare.inspect_model(name)
    reference = resolve_name(name)
    if reference.entry is not None:
        return compare.inspect_model(reference.entry.name)
    folder = reference.path or find_local_copy(reference)
    inspected = compare.inspect_model(folder or f"{reference.repo}@{reference.revision}")
    return replace(inspected, name=name)


def _split_columns(rows: list[list[str]], width: int) -> list[list[list[str]]]:
    """Split a table into tables of at most ``width`` characters, each with the first column.

    A single column that is wider than that is not split.
    """
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    groups: list[list[int]] = [[]]
    for column in range(1, len(widths)):
        used = widths[0] + sum(widths[other] for other in groups[-1])
        if groups[-1] and used + widths[column] - 2 > width:
            groups.append([])
        groups[-1].append(column)
    return [[[row[0], *(row[column] for column in group)] for row in rows] for group in groups]

"""``mlxarch compare``: architectures side by side, without their weights."""

import shutil
from pathlib import Path

import click

from mlxarch.cli.output import answer, answer_json, say, table


@click.command("compare")
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--markdown", is_flag=True, help="Print Markdown, a row for each model.")
@click.option("--svg", type=click.Path(dir_okay=False, path_type=Path), help="Draw the blocks side by side.")
def compare_command(models: tuple[str, ...], as_json: bool, markdown: bool, svg: Path | None) -> None:
    """Compare architectures, from their configs alone.

    A model is a short name, a config.json, a folder or a repository of the Hub; none means all of the catalog. No
    weights are needed: the models are built without any.
    """
    if as_json and markdown:
        raise click.UsageError("--json and --markdown exclude each other")
    from mlxarch.backend import require_backend

    require_backend()
    from mlxarch import catalog, compare

    found = [compare.compared(name) for name in models or catalog.entries()]
    if svg:
        svg.write_text(compare.svg(found), encoding="utf-8")
        say(f"{svg}: {len(found)} drawn")
    if as_json:
        answer_json([compare.as_json(model) for model in found])
    elif markdown:
        answer((compare.markdown(found) if models else compare.page(found)).rstrip("\n"))
    elif not svg:
        for rows in _that_fit(compare.table(found), shutil.get_terminal_size().columns):
            table(rows)
            answer()
        for note in (note for model in found for note in compare.published(model)):
            say(note, dim=True)


def _that_fit(rows: list[list[str]], width: int) -> list[list[list[str]]]:
    """The table as several, none wider than the terminal if it can be helped; each repeats the first column."""
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    groups: list[list[int]] = [[]]
    for column in range(1, len(widths)):
        if groups[-1] and widths[0] + sum(widths[c] for c in groups[-1]) + widths[column] - 2 > width:
            groups.append([])
        groups[-1].append(column)
    return [[[row[0], *(row[c] for c in group)] for row in rows] for group in groups]

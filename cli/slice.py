"""``mlxarch slice``: a smaller Gemma 3n out of the whole one."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlxarch.cli import options
from mlxarch.cli.output import answer, answer_json, say, size
from mlxarch.errors import InvalidInput

if TYPE_CHECKING:
    from mlxarch.slicing import Slice


@click.command("slice")
@click.argument("source")
@click.option("--to", "published", metavar="NAME", help="A published slice of Gemma 3n E4B: e2b, e1.96b, e2.54b, ...")
@click.option(
    "--ffn", metavar="W[,W...]", help="Features of the feed-forwards: one number, or one for each layer kept."
)
@click.option("--skip-layers", "skip", metavar="LIST", help="Layers to leave out, such as 3,20-24.")
@click.option("-o", "--output", metavar="DIR", help="The folder to make; else ./NAME-SLICE.")
@click.option("--force", is_flag=True, help="Replace an output that exists, once the new one is complete.")
@options.yes_option
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def slice_command(
    source: str,
    published: str | None,
    ffn: str | None,
    skip: str | None,
    output: str | None,
    force: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Write a smaller Gemma 3n out of the whole one.

    SOURCE is a folder, a repository or a short name, quantized or not; what is quantized is cut as it is, without loss.
    The numbers of the slice are the first of the whole, as these models were trained to be cut. Without --to, at least
    one of --ffn and --skip-layers says what to keep.
    """
    if published and (ffn or skip):
        raise click.UsageError("--to names widths and layers already; leave out --ffn and --skip-layers")
    if not (published or ffn or skip):
        raise click.UsageError("say what to keep: --to NAME, or --ffn and --skip-layers")
    from mlxarch.backend import require_backend

    require_backend()
    wanted = published or _slice(ffn or "", skip or "")
    from mlxarch import catalog
    from mlxarch.progress import on_terminal
    from mlxarch.quantize import prepare
    from mlxarch.quantize.card import origin_of
    from mlxarch.slicing import slice_source
    from mlxarch.weights import open_source

    reference = catalog.parse(source)
    folder = reference.path or options.obtain(source, None if reference.bits else "original", yes)
    name = folder.resolve().name if reference.path else reference.name.rsplit("/", 1)[-1].replace("@", "-")
    cut = slice_source(open_source(folder), wanted)
    label = published.lower() if published else "slice"
    conversion = prepare(cut, output or f"{name}-{label}", bits=None, origin=origin_of(Path(folder)))
    try:
        say(f"{source}: {cut.notes[-1]}; needs {size(conversion.needed)} of disk, at {conversion.output}")
        with on_terminal(None) as progress:
            summary = conversion.run(force=force, progress=progress)
    finally:
        conversion.close()
    if as_json:
        answer_json(asdict(summary))
    else:
        answer(f"{summary.output}: {size(summary.output_bytes)}, {summary.tensors} tensors")


def _slice(ffn: str, skip: str) -> "Slice":
    from mlxarch.slicing import Slice, parse_layers

    widths = [width.strip() for width in ffn.split(",")] if ffn else []
    if wrong := [width for width in widths if not (width.isascii() and width.isdigit())]:
        raise InvalidInput(f"--ffn takes numbers, separated by commas; found {wrong[0]!r}")
    return Slice(tuple(map(int, widths)), parse_layers(skip))

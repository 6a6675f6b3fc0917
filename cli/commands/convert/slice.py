"""``mlxarch slice``: extract a MatFormer sub-model of Gemma 3n."""

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from mlxarch.cli import options
from mlxarch.cli.output import print_json, print_line, print_stderr
from mlxarch.errors import InvalidInput
from mlxarch.progress import format_size, terminal_progress

if TYPE_CHECKING:
    from mlxarch.loading.matformer import Slice


@click.command("slice")
@click.argument("source")
@click.option(
    "--to",
    "published",
    metavar="NAME",
    help="Published sub-model: e2b, e1.96b, e2.54b, … (default: none)",
)
@click.option(
    "--ffn",
    metavar="W[,W...]",
    help="Feed-forward width: one number, or one for each layer kept (default: unchanged)",
)
@click.option(
    "--skip-layers",
    "skip",
    metavar="LIST",
    help="Layers to leave out, e.g. 3,20-24 (default: none)",
)
@click.option("-o", "--output", metavar="DIR", help="Output folder (default: ./NAME-SLICE)")
@options.force_option
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
    """Extract a MatFormer sub-model from Gemma 3n E4B.

    SOURCE is a folder, a repository or a short name, quantized or not; quantized weights are cut
    without loss. Gemma 3n was trained so that the first features of each feed-forward make a model
    of their own. Give --to, or --ffn, --skip-layers or both.
    """
    if published and (ffn or skip):
        raise click.UsageError(
            "--to names widths and layers already; leave out --ffn and --skip-layers"
        )
    if not (published or ffn or skip):
        raise click.UsageError("say what to keep: --to NAME, or --ffn and --skip-layers")
    from mlxarch.system.backend import require_backend

    require_backend()
    wanted = published or _parse_slice(ffn or "", skip or "")
    from mlxarch.checkpoint.source import open_checkpoint
    from mlxarch.loading.matformer import slice_source
    from mlxarch.quantize import prepare
    from mlxarch.quantize.output.model_card import origin_from_folder

    name, folder = options.obtain_source(source, yes)
    sliced = slice_source(open_checkpoint(folder), wanted)
    label = published.lower() if published else "slice"
    conversion = prepare(
        sliced, output or f"{name}-{label}", bits=None, origin=origin_from_folder(folder)
    )
    try:
        needed = format_size(conversion.disk_bytes)
        print_stderr(
            f"{source}: {sliced.notes[-1]}; needs {needed} of disk, at {conversion.output}"
        )
        with terminal_progress(None) as progress:
            summary = conversion.run(force=force, progress=progress)
    finally:
        conversion.close()
    if as_json:
        print_json(asdict(summary))
    else:
        size = format_size(summary.output_bytes)
        print_line(f"{summary.output}: {size}, {summary.tensors} tensors")


def _parse_slice(ffn: str, skip: str) -> "Slice":
    """Parse --ffn and --skip-layers; raises InvalidInput."""
    from mlxarch.loading.matformer import Slice, parse_layers

    widths = [width.strip() for width in ffn.split(",")] if ffn else []
    if wrong := [width for width in widths if not (width.isascii() and width.isdigit())]:
        raise InvalidInput(f"--ffn takes numbers, separated by commas; found {wrong[0]!r}")
    return Slice(tuple(map(int, widths)), parse_layers(skip))

"""``mlxarch pack``: experts, and rows of embeddings, laid out to be read one at a time."""

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from mlxarch.cli import options
from mlxarch.cli.output import answer, answer_json, say, size

if TYPE_CHECKING:
    from mlxarch.quantize.pack import PackSummary


@click.command("pack")
@click.argument("source")
@click.option("-o", "--output", metavar="DIR", help="The folder to make; else ./NAME-packed.")
@click.option("--force", is_flag=True, help="Replace an output that exists, once the new one is complete.")
@options.yes_option
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def pack_command(source: str, output: str | None, force: bool, yes: bool, as_json: bool) -> None:
    """Lay out a model's experts so that they can be read one at a time.

    SOURCE is a folder, a repository or a short name of a mixture of experts, or of a Gemma 3n, whose per-layer
    embeddings are laid out so; quantized or not. No number changes. Where a model is larger than the memory, its
    experts are read from the disk as tokens need them; packed, each takes one read instead of up to nine, and a
    token's embeddings one instead of three. Only mlxarch reads such a folder; `mlxarch quantize --bits original`
    undoes it.
    """
    from mlxarch.backend import require_backend

    require_backend()
    from mlxarch import catalog
    from mlxarch.progress import on_terminal
    from mlxarch.quantize.pack import prepare_pack

    reference = catalog.parse(source)
    folder = reference.path or options.obtain(source, None if reference.bits else "original", yes)
    name = folder.resolve().name if reference.path else reference.name.rsplit("/", 1)[-1].replace("@", "-")
    packing = prepare_pack(folder, output or f"{name}-packed")
    try:
        say(f"{source}: packed, needs {size(packing.needed)} of disk, at {packing.output}")
        with on_terminal(None) as progress:
            summary = packing.run(force=force, progress=progress)
    finally:
        packing.close()
    if as_json:
        answer_json(asdict(summary))
    else:
        answer(in_words(summary))


def in_words(summary: "PackSummary") -> str:
    """One line."""
    experts = size(summary.expert_bytes + summary.filled_bytes)
    parts = [f"{summary.experts} experts in {summary.layers} layers, {experts}"] if summary.layers else []
    parts += [f"per-layer embeddings, {size(summary.row_bytes)}"] if summary.row_bytes else []
    return f"{summary.output}: {', '.join(parts)}, and {size(summary.other_bytes)} of other tensors"

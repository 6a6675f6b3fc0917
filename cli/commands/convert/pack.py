"""``mlxarch pack``: repack experts and per-layer embeddings for SSD offload."""

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from mlxarch.cli import options
from mlxarch.cli.output import print_json, print_line, print_stderr
from mlxarch.progress import format_size, terminal_progress

if TYPE_CHECKING:
    from mlxarch.quantize.repack.pack_experts import PackSummary


@click.command("pack")
@click.argument("source")
@click.option("-o", "--output", metavar="DIR", help="Output folder (default: ./NAME-packed)")
@options.force_option
@options.yes_option
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def pack_command(source: str, output: str | None, force: bool, yes: bool, as_json: bool) -> None:
    """Repack a model for SSD offload, with one read per expert.

    SOURCE is a folder, a repository or a short name: a mixture-of-experts model, or a Gemma 3n,
    whose per-layer embeddings are repacked. It may be quantized. No weight changes.

    The experts of a model that is larger than the memory are read from the SSD as tokens need
    them. Packed, an expert takes one read instead of up to nine, and the per-layer embeddings of a
    token one instead of three. Only mlxarch reads the output; `mlxarch quantize --bits original`
    converts it back.
    """
    from mlxarch.system.backend import require_backend

    require_backend()
    from mlxarch.quantize.repack.pack_experts import prepare_pack

    name, folder = options.obtain_source(source, yes)
    packing = prepare_pack(folder, output or f"{name}-packed")
    try:
        needed = format_size(packing.disk_bytes)
        print_stderr(f"{source}: packed, needs {needed} of disk, at {packing.output}")
        with terminal_progress(None) as progress:
            summary = packing.run(force=force, progress=progress)
    finally:
        packing.close()
    if as_json:
        print_json(asdict(summary))
    else:
        print_line(_describe_summary(summary))


def _describe_summary(summary: "PackSummary") -> str:
    parts = []
    if summary.layers:
        experts = format_size(summary.expert_bytes + summary.filled_bytes)
        parts.append(f"{summary.experts} experts in {summary.layers} layers, {experts}")
    if summary.row_bytes:
        parts.append(f"per-layer embeddings, {format_size(summary.row_bytes)}")
    other = format_size(summary.other_bytes)
    return f"{summary.output}: {', '.join(parts)}, and {other} of other tensors"

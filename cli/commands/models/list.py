"""``mlxarch list``: the catalog and the models on this machine."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from mlxarch.cli.options import json_option
from mlxarch.cli.output import print_json, print_line, print_table
from mlxarch.progress import format_size
from mlxarch.quantization.formats import DEFAULT_BITS

if TYPE_CHECKING:
    from mlxarch.store.installed import InstalledModel


@click.command("list")
@click.option(
    "--installed/--all",
    default=False,
    help="List installed models only, or the catalog too (default: all).",
)
@json_option
def list_command(installed: bool, as_json: bool) -> None:
    """List available and installed models.

    STATUS says which bits are here or ready to download. `mlxarch show` says where a model lies.
    """
    from mlxarch.hub import catalog
    from mlxarch.store import obtain as store

    models = store.list_installed()
    if installed:
        _print_installed(models, as_json)
        return
    copies: dict[str, list[InstalledModel]] = {name: [] for name in catalog.entries()}
    others = []
    for model in models:
        name = _catalog_name(model.name)
        copies.get(name, others).append(model)
    if as_json:
        print_json(
            {
                "catalog": [_entry_json(name, copies[name]) for name in copies],
                "others": [asdict(model) for model in others],
            }
        )
        return
    _print_catalog(copies)
    if others:
        print_line("\nAlso on this machine:")
        _print_installed(others, False)
    if unfinished := store.list_unfinished():
        print_line("\nUnfinished; the same command goes on, `mlxarch rm NAME` removes it:")
        print_table((name, format_size(count)) for name, count in unfinished.items())
    print_line(
        "\nready: quantized already, to download; others are quantized on this machine.\n"
        "A name without bits means a copy that is here, or else the largest of 8 and 4\n"
        "bits that fits this machine; NAME-4bit says them. `mlxarch fit NAME` tells\n"
        "memory and speed, `mlxarch show NAME` licence, context and sources."
    )


def _print_catalog(copies: "dict[str, list[InstalledModel]]") -> None:
    """Print a row for each catalog entry; whether it is here comes last."""
    from mlxarch.hub import catalog

    sizes = [f"{bits} BITS" for bits in DEFAULT_BITS]
    rows = [("", "NAME", "PARAMS", *sizes, "STATUS")]
    for entry in catalog.entries().values():
        installed = [str(model.bits or "original") for model in copies[entry.name]]
        ready = [str(source.bits) for source in entry.ready]
        if installed:
            status = f"here: {', '.join(installed)}"
        elif ready:
            status = f"ready: {', '.join(ready)}"
        else:
            status = "to quantize, gated" if entry.gated else "to quantize"
        rows.append(
            (
                "*" if installed else "",
                entry.name,
                _format_count(entry.parameters),
                *(format_size(entry.quantized_bytes(bits)) for bits in DEFAULT_BITS),
                status,
            )
        )
    licence, context, parameters = 6, 5, 2
    print_table(rows, optional=(licence, context, parameters))


_ORIGINS = {"mlxarch": "made here", "hub": "Hub's cache", "folder": "MLXARCH_MODELS"}


def _print_installed(models: "list[InstalledModel]", as_json: bool) -> None:
    if as_json:
        print_json([asdict(model) for model in models])
    elif not models:
        print_line(
            "no models are here yet; `mlxarch list` shows the names, `mlxarch pull NAME` brings one"
        )
    else:
        rows = [("NAME", "BITS", "SIZE", "FROM")]
        for model in models:
            bits = str(model.bits or "-")
            rows.append((model.name, bits, format_size(model.bytes), _ORIGINS[model.origin]))
        print_table(rows)


def _catalog_name(name: str) -> str:
    """Return the catalog name of an installed model: smollm2-135m-8bit -> smollm2-135m."""
    from mlxarch.hub import catalog

    return name if "/" in name or "--" in name else catalog.normalize_name(name)[0]


def _entry_json(name: str, copies: "list[InstalledModel]") -> dict[str, Any]:
    from mlxarch.hub import catalog

    entry = catalog.entries()[name]
    sizes = {str(bits): entry.quantized_bytes(bits) for bits in DEFAULT_BITS}
    return {
        "name": entry.name,
        "title": entry.title,
        "architecture": entry.architecture,
        "layers": entry.layers,
        "parameters": entry.parameters,
        "context": entry.context,
        "licence": entry.licence,
        "gated": entry.gated,
        "bytes": {**sizes, "original": entry.weight_bytes},
        "installed": [asdict(model) for model in copies],
    }


def _format_count(number: int) -> str:
    return f"{number / 1e9:.1f}B" if number >= 999_500_000 else f"{number / 1e6:.0f}M"

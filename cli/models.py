"""The commands about models on this machine: pull, list, show, rm; and paths."""

import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from mlxarch.cli import options
from mlxarch.cli.output import answer, answer_json, is_terminal, say, size, table
from mlxarch.cli.receipts import lines
from mlxarch.errors import Declined

if TYPE_CHECKING:
    from mlxarch.inventory import Installed

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command("pull")
@click.argument("model", required=False)
@options.model_option
@options.bits_option
@click.option("--no-eval", is_flag=True, help="Do not measure what was quantized against its source.")
@options.yes_option
def pull_command(model: str | None, named: str | None, bits: str | None, no_eval: bool, yes: bool) -> None:
    """Download a model, quantized on the way where need be.

    A short name comes at the largest of 8 and 4 bits that fits this machine, a repository as it is published; --bits
    asks for others. What it takes and whether it fits are said before it begins; above 5 GB, or where it does not fit,
    you are asked. The folder is printed. What was quantized from a source that stays here is measured against it;
    `mlxarch show` tells the result.
    """
    from mlxarch.backend import require_backend

    require_backend()
    answer(str(options.obtain(options.the_model(named, model), bits, yes, refresh=True, evaluate=not no_eval)))


@click.command("list")
@click.option("--installed/--all", default=False, help="Only what is on this machine, or all names (the default).")
@json_option
def list_command(installed: bool, as_json: bool) -> None:
    """List the models there are, and those that are here."""
    from mlxarch import catalog, store

    here = store.installed()
    if installed:
        _list_installed(here, as_json)
        return
    copies: dict[str, list[Installed]] = {name: [] for name in catalog.entries()}
    others = [model for model in here if _entry_of(model.name) not in copies]
    for model in here:
        copies.get(_entry_of(model.name), []).append(model)
    if as_json:
        answer_json(
            {
                "catalog": [_facts(name, copies[name]) for name in copies],
                "others": [asdict(model) for model in others],
            }
        )
        return
    rows = [("", "NAME", "PARAMETERS", "8 BITS", "4 BITS", "CONTEXT", "LICENCE", "HERE")]
    for entry in catalog.entries().values():
        held = [f"{model.bits} bits" if model.bits else "original" for model in copies[entry.name]]
        eight, four = (size(entry.quantized_bytes(bits)) for bits in (8, 4))
        licence = entry.licence + (" (gated)" if entry.gated else "")
        facts = (_count(entry.parameters), eight, four, str(entry.context), licence)
        rows.append(("*" if held else "", entry.name, *facts, ", ".join(held)))
    table(rows)
    if others:
        answer("\nAlso on this machine:")
        _list_installed(others, False)
    if left := store.unfinished():
        answer("\nUnfinished, and gone on with when asked for again, or removed by `mlxarch rm`:")
        table((name, size(bytes)) for name, bytes in left.items())
    answer("\nA name without bits means the largest of 8 and 4 that fits this machine; NAME-4bit says them.")


def _list_installed(models: "list[Installed]", as_json: bool) -> None:
    if as_json:
        answer_json([asdict(model) for model in models])
    elif not models:
        answer("no models are here yet; `mlxarch list` shows the names, `mlxarch pull NAME` brings one")
    else:
        rows = [("NAME", "BITS", "SIZE", "PATH")]
        rows += [(model.name, str(model.bits or "-"), size(model.bytes), str(model.path)) for model in models]
        table(rows)


def _entry_of(name: str) -> str:
    """The catalog's name in the name of a copy: smollm2-135m-8bit -> smollm2-135m."""
    from mlxarch import catalog

    return name if "/" in name or "--" in name else catalog.normalize(name)[0]


def _facts(name: str, copies: "list[Installed]") -> dict[str, Any]:
    from mlxarch import catalog

    entry = catalog.entries()[name]
    facts = {
        field: getattr(entry, field) for field in ("name", "title", "architecture", "layers", "parameters", "context")
    }
    sizes = {str(bits): entry.quantized_bytes(bits) for bits in (8, 4)}
    return {
        **facts,
        **{"licence": entry.licence, "gated": entry.gated, "bytes": {**sizes, "original": entry.weight_bytes}},
        "installed": [asdict(model) for model in copies],
    }


def _count(number: int) -> str:
    return f"{number / 1e9:.1f}B" if number >= 999_500_000 else f"{number / 1e6:.0f}M"


@click.command("show")
@click.argument("model", required=False)
@options.model_option
@json_option
def show_command(model: str | None, named: str | None, as_json: bool) -> None:
    """Show what is known of a model, without downloading it.

    Of one that mlxarch made here, also the receipt: how it was made, and how much of its original is left.
    """
    from mlxarch import receipts, store

    name = options.the_model(named, model)
    facts = store.describe(name)
    is_folder = os.path.isdir(name)
    folders: list[str] = [name] if is_folder else [copy["path"] for copy in facts["installed"]]
    found = {folder: receipt for folder in folders if (receipt := receipts.read(folder))}
    if as_json:
        answer_json(facts | {"receipts": found})
        return
    hidden = {"installed", "sources"} if is_folder else {"installed"}
    rows = [(f"{key.removesuffix('_bytes')}:", _shown(key, value)) for key, value in facts.items() if key not in hidden]
    rows += [("here:", f"{copy['name']}, {size(copy['bytes'])}, {copy['path']}") for copy in facts["installed"]]
    table(rows if facts["installed"] or is_folder else [*rows, ("here:", "no")])
    for folder, receipt in found.items():
        answer(f"\nThe receipt in {folder}:")
        table(lines(receipt))


def _shown(key: str, value: Any) -> str:
    match key, value:
        case "parameters" | "active", int():
            return f"{value:,}"
        case "source_bytes", int():
            return size(value)
        case "bytes", dict():
            return ", ".join(f"{size(count)} at {bits} bits" for bits, count in value.items())
        case _, dict():
            return ", ".join(f"{name} {held}" for name, held in value.items()) or "-"
        case _, list():
            return ", ".join(map(str, value)) or "-"
        case _, bool():
            return "yes" if value else "no"
    return "-" if value is None else str(value)


@click.command("rm")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@options.yes_option
@click.option("--hub", is_flag=True, help="The copy in the Hub's cache, which other programs share.")
def rm_command(models: tuple[str, ...], yes: bool, hub: bool) -> None:
    """Remove models that mlxarch made.

    Folders that it did not make are never removed.
    """
    from mlxarch import store

    if not yes and not is_terminal(sys.stdin):
        raise click.UsageError("nobody is there to be asked: --yes removes without asking")
    for name in models:

        def agreed(freed: int, name: str = name) -> bool:
            return yes or click.confirm(f"Remove {name}, {size(freed)}?", err=True)

        try:
            say(f"{name}: {size(store.remove(name, from_hub_cache=hub, confirm=agreed))} freed")
        except Declined as stays:
            say(str(stays))


@click.command("paths")
@json_option
def paths_command(as_json: bool) -> None:
    """Print where files are kept."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from mlxarch import paths

    places = {"models": paths.models(), "config": paths.config(), "cache": paths.cache(), "state": paths.state()}
    found = {name: str(path) for name, path in places.items()} | {"hub": HF_HUB_CACHE, "python": sys.executable}
    if extra := os.environ.get("MLXARCH_MODELS"):
        found["more models"] = extra
    if as_json:
        answer_json(found)
    else:
        table([(f"{name}:", path) for name, path in found.items()])

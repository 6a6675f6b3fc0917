"""Compare architectures from their configs alone, for ``mlxarch compare`` and its docs page."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from mlxarch.errors import InvalidInput
from mlxarch.hub import catalog, hub_cache, hub_client
from mlxarch.hub.catalog import CatalogEntry
from mlxarch.inspection.diagram import draw_svg
from mlxarch.inspection.structure import (
    KV_CONTEXT,
    Structure,
    format_parameters,
    structure_from_config,
)
from mlxarch.inspection.trace import FeedForwardShape
from mlxarch.system.untrusted_files import read_json

# Relative difference from the published number of active parameters above which a note explains it
ACTIVE_TOLERANCE = 0.05


@dataclass(frozen=True)
class InspectedModel:
    """A model, the name it was asked for by, and its catalog ``entry`` if it has one."""

    name: str
    title: str
    structure: Structure
    entry: CatalogEntry | None = None


def inspect_model(name: str | os.PathLike[str]) -> InspectedModel:
    """Return the structure of a model whose weights need not be on this machine.

    Args:
        name: a catalog name, whose published config comes with mlxarch; a config.json, or a folder
            that has one; or a Hub repository, from which only config.json is downloaded.

    Raises:
        ModelNotFound, OfflineError, GatedModel: the config cannot be obtained.
        UnsupportedArchitecture, ConfigError: the architecture is not supported.
    """
    text = os.fspath(name)
    if Path(text).is_file() and Path(text).suffix == ".json":
        return InspectedModel(text, Path(text).name, structure_from_config(read_json(text)))
    reference = catalog.parse(text)
    if entry := reference.entry:
        structure = structure_from_config(read_json(entry.config_path))
        return InspectedModel(entry.name, entry.title, structure, entry)
    if reference.path is not None and reference.path.suffix.lower() == ".gguf":
        raise InvalidInput(
            f"{text} is a GGUF file: `mlxarch pull {text}` imports it into a folder, which can be "
            "compared"
        )
    if reference.path is not None:
        title = hub_cache.model_title(reference.path)
        config = reference.path / "config.json"
    else:
        repo = str(reference.repo)
        title = repo.split("/")[-1]
        config = hub_client.fetch_file(repo, reference.revision or "main", "config.json")
    return InspectedModel(text, title, structure_from_config(read_json(config)))


# The facts, in the order in which they are shown --------------------------------------------------

Fact = Callable[[InspectedModel], str]


def _weight_size(bits: int) -> Fact:
    return lambda m: _format_bytes(m.structure.weight_bytes[bits])


FACTS: Mapping[str, Fact] = {
    "parameters": lambda m: format_parameters(m.structure.parameters),
    "active": lambda m: format_parameters(m.structure.active_parameters),
    "layers": lambda m: f"{m.structure.layers}",
    "width": lambda m: f"{m.structure.hidden_size}",
    "attention": lambda m: (
        f"{m.structure.attention}, {m.structure.heads} heads of {m.structure.head_size}"
    ),
    "KV heads": lambda m: "latent" if m.structure.attention == "MLA" else f"{m.structure.kv_heads}",
    "QK-norm": lambda m: m.structure.qk_norm,
    "attention scores": lambda m: m.structure.score_modifiers or "plain",
    "attention span": lambda m: m.structure.windows,
    "norms": lambda m: f"{m.structure.norm_placement} ({m.structure.norm})",
    "positions": lambda m: m.structure.positions,
    "feed-forward": lambda m: m.structure.feed_forward,
    "experts": lambda m: m.structure.experts,
    "vocabulary": lambda m: f"{m.structure.vocab_size}" + (", tied" if m.structure.tied else ""),
    "context": lambda m: f"{m.structure.context}",
    "KV per token": lambda m: _format_bytes(m.structure.kv_bytes_per_token),
    "KV at 32k": lambda m: (
        _format_bytes(m.structure.kv_bytes_at_32k)
        + ("*" if m.structure.context < KV_CONTEXT else "")
    ),
    "state": lambda m: _format_bytes(m.structure.state_bytes) if m.structure.state_bytes else "no",
    "16 bits": _weight_size(16),
    "8 bits": _weight_size(8),
    "4 bits": _weight_size(4),
}


def _format_bytes(number: int) -> str:
    for size, unit in ((10**9, "GB"), (10**6, "MB")):
        if number >= size:
            return f"{number / size:.{1 if number < 100 * size else 0}f} {unit}"
    return f"{number / 1000:.0f} kB"


# Field -> key in JSON, where they differ: keys of released versions stay
_JSON_KEYS = {
    "active_parameters": "active",
    "score_modifiers": "scores",
    "norm_placement": "norms",
    "vocab_size": "vocabulary",
    "kv_bytes_per_token": "kv_bytes",
    "block_classes": "parts",
    "activation": "gate",
    "intermediate_size": "width",
    "num_experts": "experts",
    "experts_per_token": "chosen",
    "shared_intermediate_size": "beside",
}


def to_json(model: InspectedModel) -> dict[str, Any]:
    """Return all facts as JSON values; sizes are in bytes, layers are counted from 0."""
    blocks = [
        {
            "layers": list(block.layers),
            "branches": [
                [[submodule.name for submodule in stage] for stage in branch]
                for branch in block.branches
            ],
            "feed_forward": _fields_to_json(block.feed_forward),
        }
        for block in model.structure.blocks
    ]
    sizes = {str(bits): size for bits, size in model.structure.weight_bytes.items()}
    return {
        "name": model.name,
        "title": model.title,
        **_fields_to_json(model.structure),
        "weight_bytes": sizes,
        "blocks": blocks,
    }


def _fields_to_json(value: Structure | FeedForwardShape) -> dict[str, Any]:
    return {_JSON_KEYS.get(name, name): item for name, item in dataclasses.asdict(value).items()}


def comparison_table(models: Sequence[InspectedModel]) -> list[list[str]]:
    """Return a row for each fact and a column for each model, with a header row and column."""
    return [
        ["", *(m.title for m in models)],
        *([name, *map(fact, models)] for name, fact in FACTS.items()),
    ]


def footnote(models: Sequence[InspectedModel]) -> str:
    """Explain the asterisk of the table; empty if it has none."""
    if all(model.structure.context >= KV_CONTEXT for model in models):
        return ""
    return f"* KV cache at the model's longest context, which is shorter than {KV_CONTEXT:,} tokens"


def to_svg(models: Sequence[InspectedModel]) -> str:
    """Draw the blocks of the models side by side."""
    return draw_svg([(model.title, model.structure) for model in models])


# Markdown -----------------------------------------------------------------------------------------

DEFINITIONS = """\
*Parameters* are those of the text model; a tied output head is not counted twice. *Active*
parameters are those read to compute one token: all but the experts that the router does not choose,
and one row of an embedding table, unless that table is also the output head. *KV* is the size of a
16-bit KV cache: per token while no window is full, and at 32,768 tokens (\\*: at the maximum
context, which is shorter), taking windows, latents and shared layers into account. *State* is what
recurrent layers keep for a sequence of any length, in float32 beside 16-bit convolution inputs. The
sizes at 16, 8 and 4 bits are those of all weights as `mlxarch quantize` writes them, in groups of 64.
"""


def to_markdown(models: Sequence[InspectedModel]) -> str:
    """Return a table with a row for each model, definitions, and notes on published counts."""
    rows = [["model", *FACTS], *([m.title, *(fact(m) for fact in FACTS.values())] for m in models)]
    lines = [_markdown_table(rows), "", DEFINITIONS]
    notes = [note for m in models for note in published_differences(m)]
    if notes:
        lines += ["Differences from published counts:", "", *(f"- {note}" for note in notes), ""]
    return "\n".join(lines)


def published_differences(model: InspectedModel) -> list[str]:
    """Explain where and why our parameter counts differ from the published ones."""
    structure = model.structure
    entry = model.entry
    if entry is None:
        return []
    notes = []
    if entry.published and entry.outside:
        notes.append(
            f"{model.title}: its repository holds {entry.published:,} parameters, "
            f"with {entry.outside}."
        )
    active = structure.active_parameters
    if entry.published_active and abs(active / entry.published_active - 1) > ACTIVE_TOLERANCE:
        table = structure.vocab_size * structure.hidden_size  # as large as the output head
        if active > entry.published_active:
            reason = "leaves the output head out"
            counted_alike = active - table
        else:
            reason = "counts the table of the input embeddings too"
            counted_alike = active + table
        notes.append(
            f"{model.title}: published as {format_parameters(entry.published_active)} active, "
            f"which {reason}; counted the same way, there are {format_parameters(counted_alike)}."
        )
    return notes


def architectures_page(models: Sequence[InspectedModel]) -> str:
    """Return docs/architectures.md: all models, and blocks and layer order of each architecture."""
    return "\n".join(
        [
            "# Architectures",
            "",
            "Written by `mlxarch compare --markdown`, from the models in `models/` and the",
            "published configs that come with mlxarch. `mlxarch compare A B --svg FILE` draws the",
            "blocks of some of them side by side.",
            "",
            "## Models",
            "",
            to_markdown(models),
            "## Blocks",
            "",
            "The classes of `mlxarch/blocks` that each file in `models/` uses.",
            "",
            _markdown_table(block_table(models)),
            "",
            "## Layers",
            "",
            "The order in which a layer calls its modules; `+` marks where a branch is added to",
            "the residual stream, and `∥` separates parallel modules, which take the same input.",
            "",
            *_layer_lines(models),
        ]
    )


def block_table(models: Iterable[InspectedModel]) -> list[list[str]]:
    """Return a row for each architecture and a column for each class of ``mlxarch.blocks``."""
    used: dict[str, set[str]] = {}
    for model in models:
        used.setdefault(model.structure.file, set()).update(model.structure.block_classes)
    columns = sorted(set().union(*used.values()))
    rows = [
        [file, *("●" if column in used[file] else "" for column in columns)]
        for file in sorted(used)
    ]
    return [["", *columns], *rows]


def _layer_lines(models: Iterable[InspectedModel]) -> list[str]:
    """Return a line for each distinct order of modules in an architecture."""
    lines: dict[str, None] = {}
    blocks = [(m.structure.file, block) for m in models for block in m.structure.blocks]
    for file, block in sorted(blocks, key=itemgetter(0)):
        branches = (
            " → ".join(" ∥ ".join(f"`{submodule.name}`" for submodule in stage) for stage in branch)
            for branch in block.branches
        )
        lines[f"- {file}: {' + '.join(branches)} +"] = None
    return [*lines, ""]


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])

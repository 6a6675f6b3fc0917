"""Architectures side by side, from configs alone: what ``mlxarch compare`` and docs/architectures.md show."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxarch import catalog, hub
from mlxarch.catalog import Entry
from mlxarch.checkpoint import read_json
from mlxarch.drawing import draw
from mlxarch.structure import Structure, count, structure

FAR = 0.05  # share by which our count of active parameters may differ from the published one without a word


@dataclass(frozen=True)
class Compared:
    """A model by the name it was asked for; ``entry`` where it is one of the catalog."""

    name: str
    title: str
    structure: Structure
    entry: Entry | None = None


def compared(name: str | os.PathLike[str]) -> Compared:
    """The structure of a model, whose weights need not be here.

    Args:
        name: of the catalog, for which the published config comes with mlxarch; a config.json, or a folder that has
            one; a repository of the Hub, of which nothing but its config.json is fetched.

    Raises:
        ModelNotFound, OfflineError, GatedModel: there is none, or it cannot be had.
        UnsupportedArchitecture, ConfigError: it is not one that runs here.
    """
    text = os.fspath(name)
    if Path(text).is_file():
        return Compared(text, Path(text).name, structure(read_json(text)))
    reference = catalog.parse(text)
    if entry := reference.entry:
        return Compared(entry.name, entry.title, structure(read_json(entry.config)), entry)
    if reference.path is not None:
        return Compared(text, reference.path.name, structure(read_json(reference.path / "config.json")))
    repo, revision = str(reference.repo), reference.revision or "main"
    return Compared(text, repo.split("/")[-1], structure(read_json(hub.fetch(repo, revision, "config.json"))))


# The facts, in the order in which they are shown ---------------------------------------------------------------------

Fact = Callable[[Compared], str]


def _size(bits: int) -> Fact:
    return lambda m: _bytes(m.structure.weight_bytes[bits])


FACTS: Mapping[str, Fact] = {
    "parameters": lambda m: count(m.structure.parameters),
    "active": lambda m: count(m.structure.active),
    "layers": lambda m: f"{m.structure.layers}",
    "width": lambda m: f"{m.structure.hidden_size}",
    "attention": lambda m: f"{m.structure.attention}, {m.structure.heads} heads of {m.structure.head_size}",
    "KV heads": lambda m: "latent" if m.structure.attention == "MLA" else f"{m.structure.kv_heads}",
    "QK-norm": lambda m: m.structure.qk_norm,
    "scores": lambda m: m.structure.scores or "plain",
    "looks back": lambda m: m.structure.windows,
    "norms": lambda m: f"{m.structure.norms} ({m.structure.norm})",
    "positions": lambda m: m.structure.positions,
    "feed-forward": lambda m: m.structure.feed_forward,
    "experts": lambda m: m.structure.experts,
    "vocabulary": lambda m: f"{m.structure.vocabulary}" + (", tied" if m.structure.tied else ""),
    "context": lambda m: f"{m.structure.context}",
    "KV per token": lambda m: _bytes(m.structure.kv_bytes),
    "KV at 32k": lambda m: _bytes(m.structure.kv_bytes_at_32k) + ("*" if m.structure.context < 32_768 else ""),
    "16 bits": _size(16),
    "8 bits": _size(8),
    "4 bits": _size(4),
}


def _bytes(number: int) -> str:
    for size, unit in ((10**9, "GB"), (10**6, "MB")):
        if number >= size:
            return f"{number / size:.{1 if number < 100 * size else 0}f} {unit}"
    return f"{number / 1000:.0f} kB"


def as_json(model: Compared) -> dict[str, Any]:
    """All facts as values of JSON; sizes in bytes, layers counted from 0."""
    facts = dataclasses.asdict(model.structure)
    blocks = [
        {
            "layers": list(block.layers),
            "branches": [[[part.name for part in stage] for stage in branch] for branch in block.branches],
            "feed_forward": dataclasses.asdict(block.feed_forward),
        }
        for block in model.structure.blocks
    ]
    sizes = {str(bits): size for bits, size in model.structure.weight_bytes.items()}
    return {"name": model.name, "title": model.title, **facts, "weight_bytes": sizes, "blocks": blocks}


def table(models: Sequence[Compared]) -> list[list[str]]:
    """A row for each fact, a column for each model, with their names as the first row and column."""
    return [["", *(m.title for m in models)], *([name, *map(fact, models)] for name, fact in FACTS.items())]


def svg(models: Sequence[Compared]) -> str:
    """The blocks side by side."""
    return draw([(model.title, model.structure) for model in models])


# Markdown ------------------------------------------------------------------------------------------------------------

DEFINITIONS = """\
*Parameters* are those of the text model; a tied output head is not counted twice. *Active* are those that computing
one token reads: all but the experts that its router does not choose, and of a look-up table one row, unless the table
is the output head too. *KV* is what the caches hold in 16 bits: for one token while no window is full, and at 32,768
tokens (\\*: at the longest context, which is shorter), with windows, latents and layers that share taken into account.
The sizes at 16, 8 and 4 bits are those of all weights as `mlxarch quantize` writes them, in groups of 64.
"""


def markdown(models: Sequence[Compared]) -> str:
    """A table with a row for each model, the definitions, and what differs from published figures."""
    rows = [["model", *FACTS], *([m.title, *(fact(m) for fact in FACTS.values())] for m in models)]
    notes = [note for m in models for note in published(m)]
    said = ["Beside the published figures:", "", *(f"- {note}" for note in notes), ""] if notes else []
    return "\n".join([_markdown_table(rows), "", DEFINITIONS, *said])


def published(model: Compared) -> list[str]:
    """Where and why our counts are not those that were published."""
    s, entry, notes = model.structure, model.entry, []
    if entry and entry.published and entry.outside:
        notes.append(f"{model.title}: its repository holds {entry.published:,} parameters, with {entry.outside}.")
    if entry and entry.published_active and abs(s.active / entry.published_active - 1) > FAR:
        table = s.vocabulary * s.hidden_size  # as large as the output head
        more = s.active > entry.published_active
        notes.append(
            f"{model.title}: published as {count(entry.published_active)} active, which "
            + ("leaves the output head out" if more else "counts the table of the input embeddings too")
            + f"; so counted there are {count(s.active - table if more else s.active + table)}."
        )
    return notes


def page(models: Sequence[Compared]) -> str:
    """docs/architectures.md: all models, and which blocks each architecture is made of."""
    return "\n".join(
        [
            "# Architectures",
            "",
            "Written by `mlxarch compare --markdown`, from the models in `models/` and the published configs that come",
            "with mlxarch. `mlxarch compare A B --svg FILE` draws the blocks of some of them side by side.",
            "",
            "## Models",
            "",
            markdown(models),
            "## Blocks",
            "",
            "What each file in `models/` takes from `mlxarch/blocks`.",
            "",
            _markdown_table(block_table(models)),
            "",
            "## Layers",
            "",
            "In which order a layer uses its modules; `+` is where a branch is added to the residual stream, and `∥`",
            "stands between modules that take the same.",
            "",
            *_layers(models),
        ]
    )


def block_table(models: Iterable[Compared]) -> list[list[str]]:
    """A row for each architecture, a column for each class of ``mlxarch.blocks`` that some of them use."""
    used: dict[str, set[str]] = {}
    for model in models:
        used.setdefault(model.structure.file, set()).update(model.structure.parts)
    columns = sorted(set().union(*used.values()))
    rows = [[file, *("●" if column in used[file] else "" for column in columns)] for file in sorted(used)]
    return [["", *columns], *rows]


def _layers(models: Iterable[Compared]) -> list[str]:
    """A line for each order that there is in an architecture."""
    lines: dict[str, None] = {}
    for file, block in sorted(((m.structure.file, block) for m in models for block in m.structure.blocks), key=_file):
        branches = (" → ".join(" ∥ ".join(f"`{p.name}`" for p in stage) for stage in b) for b in block.branches)
        lines[f"- {file}: {' + '.join(branches)} +"] = None
    return [*lines, ""]


def _file(pair: tuple[str, object]) -> str:
    return pair[0]


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])

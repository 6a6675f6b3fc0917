"""Catalog of models, and the short names that refer to them.

A name has the form ``family-size[-variant][-bits]``: ``qwen3-8b``, ``smollm2-135m-4bit``,
``llama3.1-8b-original``. Case is ignored, as are a hyphen before a version number, ``:`` or ``_``
instead of a hyphen and ``@`` before the bits: ``Qwen-3:8b@4bit`` equals ``qwen3-8b-4bit``. Names of
GGUF quantizations, as Ollama writes them, stand for the bits that are nearest:
``gemma3:27b-it-q4_K_M`` is taken as ``gemma3-27b-4bit``.

``org/repo[@revision]`` or a link to its page refers to a repository of the Hub, and a path to a
folder. The models' data are in ``catalog.toml``.
"""

import difflib
import functools
import logging
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from mlxarch.errors import ConfigError, ModelNotFound
from mlxarch.hub.links import name_from_link
from mlxarch.system import paths

logger = logging.getLogger(__name__)

Bits = int | Literal["original"]

_BITS_SUFFIX = re.compile(r"[-@](?:([234568])-?bits?|(original))$")
# q4-K-M, iq4-xs, q8-0, fp16: names of GGUF quantizations
_GGUF_SUFFIX = re.compile(
    r"-(?:i?q([234568])(?:-[0-9]|-k|-xxs|-xs|-s|-m|-l|-xl|-nl)*|(?:b?f|fp)16)$"
)
_FAMILY_AND_VERSION = re.compile(r"^([a-z]+(?:-[a-z]+)*)-?(\d+(?:\.\d+)?n?)(?=-|$)")
_REPOSITORY = re.compile(
    r"^(?!.*\.\.)(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>\w[\w./-]*))?$",
    re.ASCII,
)
COMMIT_HASH = re.compile(r"[0-9a-f]{40}")
_DEFAULT_VARIANT_SUFFIX = re.compile(r"-(?:(?:instruct|it|chat)(?:-qat)?|latest)$")
_WEIGHT_FILES = (".safetensors", ".safetensors.index.json")
_MODEL_FILES = (*_WEIGHT_FILES, "config.json", ".gguf", ".GGUF")


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
    if (found := _BITS_SUFFIX.search(text)) or (found := _GGUF_SUFFIX.search(text)):
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
    text = follow_aliases(name)
    if not text or "\0" in text:
        raise ModelNotFound(
            "a model's name is empty; `mlxarch list --all` shows the names there are"
        )
    if path := _parse_path(text):
        return ModelReference("path", text, path=path)
    text = name_from_link(text) or text
    if found := _REPOSITORY.fullmatch(text.removeprefix("hf://").rstrip("/")):
        revision = found["revision"] or "main"
        name = text.removeprefix("hf://").rstrip("/")
        return ModelReference("repo", name, repo=found["repo"], revision=revision)
    canonical, bits = normalize_name(text)
    known = entries()
    entry = known.get(canonical) or known.get(_DEFAULT_VARIANT_SUFFIX.sub("", canonical))
    if entry is None:
        raise ModelNotFound(_unknown_name_message(text, canonical))
    spelled = re.sub(r"[:_\s]+", "-", text.lower())
    if _GGUF_SUFFIX.search(spelled) or "-qat" in spelled:
        ours = entry.name if bits is None else f"{entry.name}-{_bits_label(bits)}"
        logger.warning("%s is taken as %s, the nearest of the models here", text, ours)
    return replace(ModelReference("catalog", entry.name, entry=entry), bits=bits)


def follow_aliases(name: str) -> str:
    """Return what a name stands for in the user's config.toml, or the name itself.

    An alias is followed once only, so that a cycle ends.

    Raises:
        ConfigError: the file is malformed or cannot be read.
    """
    text = name.strip()
    aliases = load_aliases()
    while not _parse_path(text) and (target := aliases.pop(text.lower(), None)):
        text = target.strip()
    return text


def family(name: str) -> list[CatalogEntry]:
    """Return the catalog's models of a family: ``qwen3`` names qwen3-0.6b, qwen3-8b and others.

    Where the family has models that are called by their size alone, these are all: ``qwen3`` does
    not name qwen3-vl-8b.
    """
    canonical = _DEFAULT_VARIANT_SUFFIX.sub("", normalize_name(name)[0])
    if not canonical:
        return []
    begins = re.compile(re.escape(canonical) + r"(?![a-z.])(?P<sized>-e?\d)?")
    found = [(entry, begins.match(entry.name)) for entry in entries().values()]
    kin = [(entry, match) for entry, match in found if match]
    return [entry for entry, match in kin if match["sized"]] or [entry for entry, _ in kin]


def _bits_label(bits: Bits) -> str:
    return bits if isinstance(bits, str) else f"{bits}bit"


def _parse_path(text: str) -> Path | None:
    """Return the path if the text looks like one, or exists as a folder or a file of a model.

    A weight file stands for its folder, if that has a config.json.

    Raises:
        ModelNotFound: it is a file that is no model.
    """
    path = Path(text)
    if text.startswith(("./", "../", "/", "~")) or text in (".", ".."):
        try:
            path = path.expanduser()
        except RuntimeError as error:
            raise ModelNotFound(f"{text!r}: {error}; write the path in full") from error
    elif not text or "\0" in text or not _exists(path):
        return None
    elif path.is_file() and "/" not in text and not path.name.endswith(_MODEL_FILES):
        return None  # a short name may be that of a file too
    return path if not path.is_file() else _model_of_file(path)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long for a file name
        return False


def _model_of_file(path: Path) -> Path:
    if path.suffix.lower() == ".gguf":
        return path
    if path.name.endswith(_WEIGHT_FILES) or path.name == "config.json":
        if (path.parent / "config.json").is_file():
            return path.parent
        raise ModelNotFound(
            f"{path} is a weight file alone; a model is a folder that has its config.json and "
            "tokenizer too. Download the rest of its repository, and name the folder"
        )
    raise ModelNotFound(
        f"{path} is a file, and no model: name a folder with config.json and safetensors files, or "
        "a .gguf file"
    )


def _unknown_name_message(text: str, canonical: str) -> str:
    names = [*entries(), *load_aliases()]
    nearest = difflib.get_close_matches(canonical, names, n=3, cutoff=0.0)
    return (
        f"no model is called {text!r}; the nearest names are {', '.join(nearest)}. "
        "`mlxarch list --all` shows all of them; a repository of the Hub is written org/name, "
        "a folder ./name"
    )

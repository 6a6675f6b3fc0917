"""The model card of an output: where it comes from, how it was made, under which licence."""

import re
from dataclasses import dataclass
from pathlib import Path

from mlxarch.errors import MlxArchError
from mlxarch.untrusted import child, open_regular, read_exactly

_FIELD = re.compile(r"(license|license_name|license_link|base_model|pipeline_tag): *([\w./:@+-]+) *")
_HUB_SNAPSHOT = re.compile(r"models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})$")
_LICENCE_FILE = re.compile(r"(LICEN[SC]E|NOTICE|USE_POLICY|COPYING)([.-][\w-]+)?(\.(md|txt))?", re.IGNORECASE)
_LIMIT = 1 << 20  # bytes of a card or a licence that are read


@dataclass(frozen=True)
class Origin:
    """What a source says of itself: its name, the revision if it is known, simple fields of its card, licence files;
    and the SHA-256 that somebody states of its weight files, where they are not here.
    """

    name: str
    revision: str = ""
    fields: tuple[tuple[str, str], ...] = ()
    licences: tuple[Path, ...] = ()
    files: tuple[tuple[str, str], ...] = ()


def origin_of(folder: Path) -> Origin:
    """Read a source folder: its place in the Hub's cache names repository and revision, its README.md the licence."""
    snapshot = _HUB_SNAPSHOT.search(folder.resolve().as_posix())
    name, revision = (f"{snapshot[1]}/{snapshot[2]}", snapshot[3]) if snapshot else (folder.resolve().name, "")
    licences = sorted(path.name for path in folder.iterdir() if _LICENCE_FILE.fullmatch(path.name))
    paths = tuple(child(folder, name) for name in licences)
    return Origin(name, revision, tuple(_front_matter(folder).items()), tuple(p for p in paths if p.is_file()))


def _front_matter(folder: Path) -> dict[str, str]:
    try:
        descriptor, status = open_regular(child(folder, "README.md"))
    except MlxArchError:
        return {}
    with open(descriptor, "rb") as file:
        text = bytearray(min(status.st_size, _LIMIT))
        read_exactly(file.fileno(), text, 0, folder / "README.md")
    block = re.match(r"---\r?\n(.*?)\n---\s", text.decode("utf-8", "replace"), re.DOTALL)
    found = (_FIELD.fullmatch(line.rstrip()) for line in (block[1] if block else "").splitlines())
    return {match[1]: match[2] for match in found if match}


def card(
    title: str, origin: Origin, method: str, notes: tuple[str, ...], versions: dict[str, str], measured: str = ""
) -> str:
    """README.md of the output. The same arguments give the same text: it holds no date and no path.

    ``measured`` is Markdown on the quality of the output.
    """
    fields = dict(origin.fields)
    if "/" in origin.name:
        fields["base_model"] = origin.name
    head = ["library_name: mlx", *(f"{key}: {value}" for key, value in sorted(fields.items())), "tags:", "- mlx"]
    made_from = origin.name + (f" at revision {origin.revision}" if origin.revision else "")
    made_by = ", ".join(f"{package} {version}" for package, version in versions.items())
    lines = [
        *("---", *head, "---", "", f"# {title}", ""),
        f"Made from {made_from}: {method}.",
        *(("", *(f"- {note}" for note in notes)) if notes else ()),
        *(("", measured) if measured else ()),
        *("", f"Written by {made_by}. It runs with `mlxarch run`, and with every program that reads MLX models."),
    ]
    return "\n".join(lines) + "\n"

"""Model card of a quantized model (README.md): source, method, quality and licence."""

import re
from dataclasses import dataclass
from pathlib import Path

from mlxarch.errors import MlxArchError
from mlxarch.system.untrusted_files import open_regular_file, read_exactly, safe_path

_FIELD = re.compile(
    r"(license|license_name|license_link|base_model|pipeline_tag): *([\w./:@+-]+) *"
)
_HUB_SNAPSHOT = re.compile(r"models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})$")
_LICENCE_FILE = re.compile(
    r"(LICEN[SC]E|NOTICE|USE_POLICY|COPYING)([.-][\w-]+)?(\.(md|txt))?", re.IGNORECASE
)
_MAX_CARD_BYTES = 1 << 20  # read of a source's card


@dataclass(frozen=True)
class Origin:
    """Source of a quantized model, as stated on its model card.

    Attributes:
        name: name of the repository or the folder.
        revision: commit of the repository; empty if unknown.
        fields: (key, value) pairs copied from the front matter of the source's card, such as its
            licence.
        licences: licence files that are copied to the output.
        files: (name, SHA-256) of the source's weight files as the Hub states them; empty if they
            are hashed here.
    """

    name: str
    revision: str = ""
    fields: tuple[tuple[str, str], ...] = ()
    licences: tuple[Path, ...] = ()
    files: tuple[tuple[str, str], ...] = ()


def origin_from_folder(folder: Path) -> Origin:
    """Read the origin of a source folder.

    A folder in the Hub's cache names repository and revision by its path. The licence comes from
    the front matter of README.md and from licence files.
    """
    resolved = folder.resolve()
    name = resolved.name
    revision = ""
    if snapshot := _HUB_SNAPSHOT.search(resolved.as_posix()):
        name = f"{snapshot[1]}/{snapshot[2]}"
        revision = snapshot[3]
    file_names = sorted(
        path.name for path in folder.iterdir() if _LICENCE_FILE.fullmatch(path.name)
    )
    paths = tuple(safe_path(folder, file_name) for file_name in file_names)
    return Origin(
        name=name,
        revision=revision,
        fields=tuple(_front_matter(folder).items()),
        licences=tuple(path for path in paths if path.is_file()),
    )


def _front_matter(folder: Path) -> dict[str, str]:
    """The known fields in the front matter of a folder's README.md."""
    try:
        descriptor, status = open_regular_file(safe_path(folder, "README.md"))
    except MlxArchError:
        return {}
    with open(descriptor, "rb") as file:
        text = bytearray(min(status.st_size, _MAX_CARD_BYTES))
        read_exactly(file.fileno(), text, 0, folder / "README.md")
    block = re.match(r"---\r?\n(.*?)\n---\s", text.decode("utf-8", "replace"), re.DOTALL)
    lines = block[1].splitlines() if block else []
    matches = (_FIELD.fullmatch(line.rstrip()) for line in lines)
    return {match[1]: match[2] for match in matches if match}


def render_model_card(
    title: str,
    origin: Origin,
    method: str,
    notes: tuple[str, ...],
    versions: dict[str, str],
    evaluation: str = "",
) -> str:
    """Write the text of a model card in Markdown.

    It holds no date and no path, so the same arguments give the same text.

    Args:
        title: name of the model.
        origin: origin of its source.
        method: how it was made, in words.
        notes: sentences to list.
        versions: package -> version.
        evaluation: Markdown on the quality of the model; empty if it was not measured.
    """
    fields = dict(origin.fields)
    if "/" in origin.name:
        fields["base_model"] = origin.name
    front_matter = [
        "library_name: mlx",
        *(f"{key}: {value}" for key, value in sorted(fields.items())),
        "tags:",
        "- mlx",
    ]
    made_from = origin.name + (f" at revision {origin.revision}" if origin.revision else "")
    made_by = ", ".join(f"{package} {version}" for package, version in versions.items())
    lines = ["---", *front_matter, "---", "", f"# {title}", "", f"Made from {made_from}: {method}."]
    if notes:
        lines += ["", *(f"- {note}" for note in notes)]
    if evaluation:
        lines += ["", evaluation]
    lines += [
        "",
        f"Written by {made_by}. It runs with `mlxarch run`, and with every program that reads MLX "
        "models.",
    ]
    return "\n".join(lines) + "\n"

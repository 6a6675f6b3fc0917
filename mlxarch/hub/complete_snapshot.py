"""Completion of a snapshot that another program left in the Hub's cache with less than all files.

A snapshot may have its weights and lack a tokenizer, a chat template or generation_config.json. The
cache itself remembers which files a commit does not have, in ``.no_exist``; where it says nothing of
a file, the Hub is asked once.
"""

import json
import logging
from pathlib import Path

from mlxarch.errors import GatedModel, MlxArchError, OfflineError
from mlxarch.hub.file_download import fetch_file
from mlxarch.hub.hub_cache import (
    CACHED_REPOSITORY,
    cache_folder,
    remember_absent,
    repository_folder,
)
from mlxarch.hub.hub_client import (
    NO_TEMPLATES,
    SIDECARS,
    absent_sidecars,
    fetch_file_list,
    template_names,
)
from mlxarch.progress import Progress, silent
from mlxarch.system.untrusted_files import read_json

logger = logging.getLogger(__name__)

_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "tiktoken.model",
    "tekken.json",
    "tokenizer.tok.json",
)
_CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_TIMEOUT_SECONDS = 5.0  # what a start without a network may take longer


def complete_snapshot(folder: Path, progress: Progress = silent) -> None:
    """Fetch the files beside the weights that a snapshot lacks; other folders are left alone.

    Without a network, a warning says which files the snapshot may lack.

    Raises:
        OfflineError, GatedModel: the tokenizer is missing and cannot be fetched.
    """
    folder = folder.absolute()
    match = CACHED_REPOSITORY.fullmatch(folder.parent.parent.name)
    if match is None or folder.parent.name != "snapshots":
        return
    if folder.parents[2].resolve() != cache_folder().resolve():
        return
    repo = f"{match[1]}/{match[2]}"
    commit = folder.name
    unknown = _unknown_files(repo, folder)
    if not unknown:
        return
    try:
        known = fetch_file_list(repo, commit, timeout=_TIMEOUT_SECONDS).files
        wanted = [name for name in unknown if name in known] + template_names(known)
        for name in wanted:
            fetch_file(repo, commit, name, progress=progress, expected=known[name])
        remember_absent(repo, commit, absent_sidecars(known))
    except MlxArchError as failure:
        _report_incomplete(repo, folder, failure)


def _unknown_files(repo: str, folder: Path) -> list[str]:
    """Return the files that the snapshot lacks, unless its commit is known not to have them."""
    absent = repository_folder(repo) / ".no_exist" / folder.name
    unknown = [
        name for name in SIDECARS if not (folder / name).exists() and not (absent / name).exists()
    ]
    if not (folder / "additional_chat_templates").is_dir() and not (absent / NO_TEMPLATES).exists():
        unknown.append(NO_TEMPLATES)
    has_tokenizer = (folder / "tokenizer.json").exists()
    ignored = {"tekken.json"} if has_tokenizer else set()  # Mistral publishes both formats
    return [name for name in unknown if name not in ignored]


def _report_incomplete(repo: str, folder: Path, failure: MlxArchError) -> None:
    """Warn of a snapshot that may lack files.

    Raises:
        OfflineError, GatedModel: it has no tokenizer.
    """
    if not any((folder / name).exists() for name in _TOKENIZERS):
        kind = GatedModel if isinstance(failure, GatedModel) else OfflineError
        raise kind(
            f"the copy of {repo} in the Hub's cache has no tokenizer, and it cannot be fetched: "
            f"{failure}"
        ) from failure
    missing = []
    if not _has_chat_template(folder):
        missing.append("chat template")
    if not (folder / "generation_config.json").exists():
        missing.append("generation_config.json")
    if missing:
        logger.warning(
            "the copy of %s in the Hub's cache has no %s; whether there is one cannot be found out: "
            "%s",
            repo,
            " and no ".join(missing),
            failure,
        )


def _has_chat_template(folder: Path) -> bool:
    if any((folder / name).exists() for name in _CHAT_TEMPLATES):
        return True
    try:
        return "chat_template" in read_json(folder / "tokenizer_config.json")
    except (OSError, MlxArchError, json.JSONDecodeError):
        return False

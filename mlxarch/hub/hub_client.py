"""Client of the Hugging Face Hub, built on huggingface_hub: its cache, token and environment apply.

huggingface_hub reads its environment variables when it is imported; the functions here import it
on first use.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxarch.checkpoint.shards import INDEX_FILE, SINGLE_FILE, complete_set
from mlxarch.checkpoint.tp_shards import find_tp_files, tp_group
from mlxarch.errors import DownloadError, ModelNotFound
from mlxarch.hub.file_download import TIMEOUT_SECONDS, RemoteFile, bytes_here, fetch_file
from mlxarch.hub.hub_cache import remember_absent, shard_names
from mlxarch.hub.hub_errors import translate_hub_errors
from mlxarch.progress import Progress, silent
from mlxarch.system.untrusted_files import read_json

# Files that a model needs besides its weights. No others are fetched: no *.py, *.bin or *.gguf, no
# consolidated.*, nothing in original/.
SIDECARS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tiktoken.model",
    "tekken.json",
    "tokenizer.tok.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    INDEX_FILE,
)
_NAMED_TEMPLATE = re.compile(r"additional_chat_templates/[\w.-]+\.jinja")
NO_TEMPLATES = "additional_chat_templates.none"
"""Mark in the Hub's cache of a commit that has none of them."""
_FIRST_RANGE_BYTES = 100_000  # holds the header of most safetensors files
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Repository:
    """The files of a model repository at one commit.

    Attributes:
        repo: ``org/name``.
        revision: commit hash.
        sidecars: config, tokenizer and licence files by name.
        weights: weight files by name.
        config: contents of config.json.
    """

    repo: str
    revision: str
    sidecars: Mapping[str, RemoteFile]
    weights: Mapping[str, RemoteFile]
    config: Mapping[str, Any]

    @property
    def files(self) -> list[RemoteFile]:
        """All files in download order; weights last, so a folder with all of them is complete."""
        return [*self.sidecars.values(), *self.weights.values()]

    @property
    def weight_bytes(self) -> int:
        """Size of the weight files."""
        return sum(file.size for file in self.weights.values())

    @property
    def largest_group_bytes(self) -> int:
        """Size of the largest group of weight files that must be read together.

        A group is one file, or the tensor-parallel slices of the same tensors.
        """
        groups = Counter[str]()
        for file in self.weights.values():
            groups[tp_group(file.name)] += file.size
        return max(groups.values(), default=0)


@dataclass(frozen=True)
class FileList:
    """All files of a repository at one commit, by name."""

    commit: str
    files: Mapping[str, RemoteFile]


def fetch_file_list(
    repo: str, revision: str = "main", *, timeout: float = TIMEOUT_SECONDS
) -> FileList:
    """List the files of a repository.

    Args:
        repo, revision: the repository, and a branch, tag or commit.
        timeout: seconds to wait for the answer.

    Raises:
        ModelNotFound, GatedModel, OfflineError, DownloadError: see ``fetch_repository_info``.
    """
    from huggingface_hub import HfApi

    with translate_hub_errors(repo, revision):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=timeout)
        files = {
            file.rfilename: RemoteFile(
                file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else None
            )
            for file in info.siblings or []
        }
    return FileList(info.sha or revision, files)


def fetch_repository_info(repo: str, revision: str = "main") -> Repository:
    """List the files of a model repository; only config.json and the shard index are downloaded.

    Raises:
        ModelNotFound: no such repository or revision, or it has no model in safetensors format.
        GatedModel: the publisher requires consent, or a token is needed.
        OfflineError: the Hub cannot be reached.
    """
    listing = fetch_file_list(repo, revision)
    commit = listing.commit
    known = listing.files
    if "config.json" not in known:
        raise ModelNotFound(
            f"{repo}@{revision} has no config.json; name a repository that holds a language model"
        )
    # by the given revision instead of the commit, so that the cache records which commit it is
    config_path = fetch_file(repo, revision, "config.json")
    sidecars = {name: known[name] for name in SIDECARS if name in known}
    sidecars |= {name: known[name] for name in template_names(known)}
    if "tokenizer.json" in sidecars:  # Mistral publishes its tokenizer in both formats
        sidecars.pop("tekken.json", None)
    index = fetch_file(repo, commit, INDEX_FILE) if INDEX_FILE in known else None
    names = _weight_file_names(known, index)
    if missing := [name for name in names if name not in known]:
        raise ModelNotFound(
            f"{repo}@{revision}: {INDEX_FILE} names {missing[0]}, which the repository does not "
            "have"
        )
    if not names:
        raise ModelNotFound(
            f"{repo}@{revision} has no weights in safetensors; name a repository that has, such as "
            "the original one"
        )
    weights = {name: known[name] for name in names}
    return Repository(repo, commit, sidecars, weights, read_json(config_path))


def template_names(names: Iterable[str]) -> list[str]:
    """Return the names of the chat templates for special uses, such as tools."""
    return sorted(name for name in names if _NAMED_TEMPLATE.fullmatch(name))


def absent_sidecars(names: Iterable[str]) -> list[str]:
    """Return what a commit with files of these names lacks, as ``remember_absent`` notes it."""
    names = list(names)
    absent = [name for name in SIDECARS if name not in names]
    return absent if template_names(names) else [*absent, NO_TEMPLATES]


def _weight_file_names(known: Mapping[str, RemoteFile], index: Path | None) -> list[str]:
    """Return the names of the weight files.

    They are the shards that the index lists. Without an index, or with one that lists others than
    the repository has, they are model.safetensors, a set of tensor-parallel slices, the only
    safetensors file, or a set whose names count from 1 of N to N of N.
    """
    found = [
        name
        for name in known
        if name.endswith(".safetensors") and "/" not in name and not name.startswith("consolidated")
    ]
    whole = [SINGLE_FILE] if SINGLE_FILE in known else complete_set(found)
    if index is not None:
        listed = shard_names(index)
        stale = set(listed).difference(known) or set(listed) < set(whole)
        return whole if whole and stale else listed
    if whole:
        return whole
    if slices := find_tp_files("the repository", known):
        return list(slices)
    return found if len(found) == 1 else []


def missing_bytes(repository: Repository, into: Path | None = None) -> int:
    """Return how many bytes of a repository are not on this machine yet.

    Args:
        repository: the files.
        into: folder that counts beside the Hub's cache.
    """
    from huggingface_hub import try_to_load_from_cache

    missing = 0
    for file in repository.files:
        cached = try_to_load_from_cache(repository.repo, file.name, revision=repository.revision)
        if not isinstance(cached, str) and not (into and (into / file.name).is_file()):
            missing += file.size - bytes_here(repository.repo, file, into)
    return missing


def download(repository: Repository, progress: Progress = silent) -> Path:
    """Download a repository into the Hub's cache, and return the snapshot folder there.

    Files are fetched one after the other, unless they are in the cache. What an earlier attempt
    received of a file is kept and completed. The SHA-256 of each weight file is verified.

    Raises:
        DownloadError: the transfer broke off, or a checksum is wrong.
    """
    total = sum(file.size for file in repository.files)
    done = 0
    paths: list[Path] = []
    for file in repository.files:
        report = offset_progress(progress, done, total)
        paths.append(
            fetch_file(
                repository.repo, repository.revision, file.name, progress=report, expected=file
            )
        )
        done += file.size
    progress(f"downloading {repository.repo}", total, total)
    absent = absent_sidecars(repository.sidecars)
    if "tokenizer.json" in repository.sidecars:  # then tekken.json is left out, and may be there
        absent = [name for name in absent if name != "tekken.json"]
    remember_absent(repository.repo, repository.revision, absent)
    return paths[0].parent


def offset_progress(progress: Progress, offset: int, whole: int) -> Progress:
    """Return a callback for one step of a larger transfer, as a position in the whole.

    Args:
        progress: callback for the whole transfer.
        offset: bytes that are done before the step.
        whole: bytes of the whole transfer.
    """

    def report(label: str, done: int, total: int) -> None:
        progress(label, min(offset + done, whole), whole)

    return report


def fetch_safetensors_header(repo: str, revision: str, file: RemoteFile) -> bytes:
    """Download the start of a safetensors file: the size field and the header, not validated."""
    start = _fetch_start(repo, revision, file.name, min(_FIRST_RANGE_BYTES, file.size))
    length = 8 + int.from_bytes(start[:8], "little")
    too_long = length > min(file.size, _MAX_HEADER_BYTES)  # the validator rejects it later
    if length <= len(start) or too_long:
        return start[:length]
    return _fetch_start(repo, revision, file.name, length)


def _fetch_start(repo: str, revision: str, name: str, count: int) -> bytes:
    """Download the first ``count`` bytes of a file by a range request."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    body = b""
    with translate_hub_errors(repo, revision, name, started=True):
        url = hf_hub_url(repo, name, revision=revision)
        headers = {
            **build_hf_headers(),
            "Range": f"bytes=0-{count - 1}",
            "Accept-Encoding": "identity",
        }
        with get_session().stream(
            "GET", url, headers=headers, timeout=TIMEOUT_SECONDS, follow_redirects=True
        ) as response:
            hf_raise_for_status(response)
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) >= count:  # a server that ignores ranges sends the whole file
                    break
    if len(body) < count:
        raise DownloadError(
            f"{repo}/{name}: the Hub sent {len(body)} of {count} bytes; run the same command again"
        )
    return body[:count]

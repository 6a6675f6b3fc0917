"""Repositories of the Hub, all by way of huggingface_hub: its cache, its token and its environment stay as they are.

huggingface_hub reads its environment variables when it is imported; it is imported here when it is first needed.
"""

import contextlib
import errno
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxarch.catalog import COMMIT
from mlxarch.checkpoint import INDEX, SINGLE, child, read_json
from mlxarch.errors import (
    CheckpointError,
    DiskSpaceError,
    DownloadError,
    GatedModel,
    MlxArchError,
    ModelNotFound,
    OfflineError,
)
from mlxarch.progress import Progress, silent
from mlxarch.tensor_parallel import group_of, sliced_files

# What a model needs besides its weights. Nothing else is fetched: no *.py, *.bin, *.gguf, consolidated.*, no original/.
SIDECARS = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("tiktoken.model", "tekken.json", "tokenizer.tok.json"),
    *("chat_template.jinja", "chat_template.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", INDEX),
)
TIMEOUT = 10.0  # seconds for the first answer of the Hub
_CHUNK = 1 << 22


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository; ``size`` in bytes, ``sha256`` where the Hub states it (it does for weights)."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class Repository:
    """The files of a model at one commit: ``sidecars`` first, then ``weights``; ``config`` is its config.json."""

    repo: str
    revision: str
    sidecars: Mapping[str, RemoteFile]
    weights: Mapping[str, RemoteFile]
    config: Mapping[str, Any]

    @property
    def files(self) -> list[RemoteFile]:
        """In the order of fetching: weights come last, so that a folder with all its weights is complete."""
        return [*self.sidecars.values(), *self.weights.values()]

    @property
    def weight_bytes(self) -> int:
        """Size of the weights."""
        return sum(file.size for file in self.weights.values())

    @property
    def most_at_once(self) -> int:
        """Bytes of weight files that are read together, at most: those of one file, or of all slices of a tensor."""
        groups = Counter[str]()
        for file in self.weights.values():
            groups[group_of(file.name)] += file.size
        return max(groups.values(), default=0)


def look_up(repo: str, revision: str = "main") -> Repository:
    """What a model repository holds, and how large it is; only config.json and the shard index are fetched.

    Raises:
        ModelNotFound: no such repository or revision, or it holds no model in safetensors.
        GatedModel: an agreement or a token is needed first.
        OfflineError: the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    with translated(repo, revision):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT)
        commit = info.sha or revision
        known = {
            file.rfilename: RemoteFile(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else None)
            for file in info.siblings or []
        }
    if "config.json" not in known:
        raise ModelNotFound(f"{repo}@{revision} has no config.json; name a repository that holds a language model")
    config_path = fetch(repo, revision, "config.json")  # by the name that was asked for: the cache notes its commit
    sidecars = {name: known[name] for name in SIDECARS if name in known}
    if "tokenizer.json" in sidecars:  # Mistral publishes its tokenizer twice
        sidecars.pop("tekken.json", None)
    index = fetch(repo, commit, INDEX) if INDEX in known else None
    names = _weight_names(known, index)
    if missing := [name for name in names if name not in known]:
        raise ModelNotFound(f"{repo}@{revision}: {INDEX} names {missing[0]}, which the repository does not have")
    if not names:
        raise ModelNotFound(
            f"{repo}@{revision} has no weights in safetensors; name a repository that has, such as the original one"
        )
    return Repository(repo, commit, sidecars, {name: known[name] for name in names}, read_json(config_path))


def _weight_names(known: Mapping[str, RemoteFile], index: Path | None) -> list[str]:
    """As in a folder: the index decides which shards count; without one it is model.safetensors, the only file, or a
    set of slices.
    """
    if index is not None:
        return shard_names(index)
    if SINGLE in known:
        return [SINGLE]
    if slices := sliced_files("the repository", known):
        return list(slices)
    found = [n for n in known if n.endswith(".safetensors") and "/" not in n and not n.startswith("consolidated")]
    return found if len(found) == 1 else []


def shard_names(index: Path) -> list[str]:
    """The weight files that a shard index names, sorted; every name is a plain one, see ``checkpoint.child``."""
    table = read_json(index, limit=100_000_000, depth=8, values=2_000_000, error=CheckpointError).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(f"{index}: weight_map must name the file of each tensor; take another revision")
    names = sorted(set(table.values()))
    for name in names:
        child(index.parent, name)
    return names


def cached(repo: str, revision: str = "main") -> Path | None:
    """The folder of a complete copy in the Hub's cache, or None. The network is not used."""
    from huggingface_hub import try_to_load_from_cache

    with translated(repo, revision):
        found = try_to_load_from_cache(repo, "config.json", revision=revision)
    folder = Path(found).parent if isinstance(found, str) else None
    return folder if folder and is_complete(folder) else None


def is_complete(folder: Path) -> bool:
    """Whether a folder has a config, a tokenizer and all weight files that its index names (or the only one)."""
    try:
        if not (folder / "config.json").is_file():
            return False
        index = folder / INDEX
        if index.is_file():
            return all((folder / name).is_file() for name in shard_names(index))
        names = [path.name for path in folder.glob("*.safetensors") if path.is_file()]
        if SINGLE not in names:
            sliced_files(folder, names)  # raises where some are missing
        return bool(names)
    except (OSError, MlxArchError):
        return False


def cache_folder() -> Path:
    """Where the Hub's cache is (HF_HUB_CACHE, HF_HOME)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def missing_bytes(repository: Repository) -> int:
    """How much of a repository the Hub's cache does not hold yet."""
    from huggingface_hub import try_to_load_from_cache

    held = (try_to_load_from_cache(repository.repo, f.name, revision=repository.revision) for f in repository.files)
    return sum(f.size for f, path in zip(repository.files, held, strict=True) if not isinstance(path, str))


def download(repository: Repository, progress: Progress = silent) -> Path:
    """Fetch a repository into the Hub's cache, one file after the other, and return its folder there.

    Files that are there already are not fetched again. The SHA-256 of each weight file that arrives is checked.

    Raises:
        DownloadError: the transfer broke off, or brought other bytes than the Hub promised.
    """
    total, before = sum(file.size for file in repository.files), 0
    paths: list[Path] = []
    for file in repository.files:
        report = shifted(progress, before, total)
        paths.append(fetch(repository.repo, repository.revision, file.name, progress=report, expected=file))
        before += file.size
    progress(f"downloading {repository.repo}", total, total)
    return paths[0].parent


def shifted(progress: Progress, before: int, whole: int) -> Progress:
    """Reports of one part of ``whole`` bytes, ``before`` of which are done already."""

    def report(label: str, done: int, total: int) -> None:
        progress(label, min(before + done, whole), whole)

    return report


def fetch(
    repo: str,
    revision: str,
    name: str,
    *,
    into: Path | None = None,
    progress: Progress = silent,
    expected: RemoteFile | None = None,
) -> Path:
    """One file, into the Hub's cache or, with ``into``, into a folder of its own; a file that is there is not fetched.

    ``expected`` states the SHA-256 that newly fetched bytes must have. Raises what ``look_up`` and ``download`` raise.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    with translated(repo, revision, name, started=True):
        held = try_to_load_from_cache(repo, name, revision=revision)
        if isinstance(held, str) and (COMMIT.fullmatch(revision) or into is not None):
            return Path(held)
        bar = _bar(f"downloading {repo}", progress)
        path = Path(hf_hub_download(repo, name, revision=revision, local_dir=into, tqdm_class=bar))
    if expected and expected.sha256 and not isinstance(held, str):
        _check(path, expected, progress)
    return path


def _check(path: Path, expected: RemoteFile, progress: Progress) -> None:
    found = sha256(path, progress)
    if found == expected.sha256:
        return
    if path.is_symlink():
        (path.parent / os.readlink(path)).unlink(missing_ok=True)
    path.unlink()
    raise DownloadError(
        f"{expected.name} arrived damaged: its SHA-256 is {found}, and the Hub states {expected.sha256}. It is "
        "removed; run the same command again, and if that repeats, look to the network or the mirror (HF_ENDPOINT)"
    )


def sha256(path: Path, progress: Progress = silent) -> str:
    """SHA-256 of a file as lower-case hexadecimal digits."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            progress(f"checking {path.name}", done, total)
    return digest.hexdigest()


def header(repo: str, revision: str, file: RemoteFile) -> bytes:
    """The first bytes of a remote safetensors file: its size field and its header, not yet validated."""
    start = _range(repo, revision, file.name, min(100_000, file.size))
    length = 8 + int.from_bytes(start[:8], "little")
    if length <= len(start) or length > min(file.size, 100_000_000):  # the validator refuses the second case
        return start[:length]
    return _range(repo, revision, file.name, length)


def _range(repo: str, revision: str, name: str, count: int) -> bytes:
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    body = b""
    with translated(repo, revision, name, started=True):
        url = hf_hub_url(repo, name, revision=revision)
        asked = {**build_hf_headers(), "Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", url, headers=asked, timeout=TIMEOUT, follow_redirects=True) as response:
            hf_raise_for_status(response)
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) >= count:  # a server that ignores ranges sends the whole file
                    break
    if len(body) < count:
        raise DownloadError(f"{repo}/{name}: the Hub sent {len(body)} of {count} bytes; run the same command again")
    return body[:count]


def _bar(label: str, progress: Progress) -> Any:
    """huggingface_hub reports to a class in the manner of tqdm; this one passes the bytes on."""

    class Bar:
        total, n = 0, 0

        def __init__(self, *_: object, **options: Any) -> None:
            self.total = options.get("total") or 0
            self.update(options.get("initial") or 0)

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: object) -> None: ...

        def update(self, count: float | None = 1) -> None:
            self.n += int(count or 0)
            progress(label, self.n, max(int(self.total), self.n))

        def _nothing(self, *_: object, **__: object) -> None: ...

        update_transfer = set_postfix_str = set_transfer_postfix_str = _nothing
        set_description = set_description_str = refresh = close = clear = _nothing

    return Bar


@contextlib.contextmanager
def translated(repo: str, revision: str, name: str | None = None, *, started: bool = False) -> Iterator[None]:
    """Turn huggingface_hub's errors into ours. ``started``: the Hub has answered, so a lost line is a DownloadError."""
    try:
        yield
    except MlxArchError:
        raise
    except Exception as error:
        ours = _translation(error, f"{repo}@{revision}" + (f"/{name}" if name else ""), repo, started)
        if ours is None:
            raise
        raise ours from error


def _translation(error: BaseException, what: str, repo: str, started: bool) -> MlxArchError | None:
    from huggingface_hub import constants, errors

    causes = _causes(error)
    kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    status = next((c.response.status_code for c in causes if isinstance(c, errors.HfHubHTTPError)), None)
    page = f"{constants.ENDPOINT}/{repo}"
    if isinstance(error, errors.GatedRepoError):
        return GatedModel(
            f"{what} asks for an agreement first: sign in at {page}, accept its terms, make a token there and set "
            "HF_TOKEN to it (or run `hf auth login`), then run the same command again"
        )
    if status == 401 and "RepositoryNotFoundError" not in kinds:
        return GatedModel(f"{what}: the Hub refuses the token; set HF_TOKEN to a valid one or unset it")
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFound(f"{what}: the repository has no such revision; {page} shows those it has")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelNotFound(
            f"{what}: the Hub has no such repository, or it is private; check the spelling, or set HF_TOKEN"
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return ModelNotFound(f"{what}: the repository has no such file at this revision")
    if isinstance(error, errors.HFValidationError):
        return ModelNotFound(f"{what} is no name of a repository: {error}; write org/name")
    if status in (403, 451):
        return GatedModel(f"{what}: the Hub refuses access ({error}); see {page}")
    if "OfflineModeIsEnabled" in kinds:
        return OfflineError(f"{what} is not on this machine and HF_HUB_OFFLINE is set; unset it to download")
    if any(isinstance(c, OSError) and c.errno in (errno.ENOSPC, errno.EDQUOT) for c in causes):
        return DiskSpaceError(f"the disk is full while fetching {what}; free some space and run the command again")
    if kinds & {"ConnectError", "ConnectTimeout", "ProxyError"} and not started:
        return OfflineError(
            f"{what}: {constants.ENDPOINT} cannot be reached; check the network, HF_ENDPOINT and proxies"
        )
    broken = {"TransportError", "HfHubHTTPError", "FileMetadataError", "LocalEntryNotFoundError", "XetDownloadError"}
    if kinds & broken or "Consistency check failed" in str(error):
        return DownloadError(
            f"{what} broke off ({_first_line(error)}); run the same command again: files that arrived are kept"
        )
    return None


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)

"""Translate errors of huggingface_hub to exceptions of ``mlxarch.errors``, each with a remedy."""

import contextlib
import errno
from collections.abc import Iterator

from mlxarch.errors import (
    DiskSpaceError,
    DownloadError,
    GatedModel,
    MlxArchError,
    ModelNotFound,
    OfflineError,
)

_CONNECTION_ERRORS = {"ConnectError", "ConnectTimeout", "ProxyError"}
_TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
_TRANSFER_ERRORS = {
    "TransportError",
    "HfHubHTTPError",
    "FileMetadataError",
    "LocalEntryNotFoundError",
    "XetDownloadError",
}


@contextlib.contextmanager
def translate_hub_errors(
    repo: str, revision: str, name: str | None = None, *, started: bool = False
) -> Iterator[None]:
    """Raise huggingface_hub's errors as exceptions of ``mlxarch.errors``.

    Args:
        repo: repository that is accessed, for the message.
        revision: its revision.
        name: file that is accessed, if one is.
        started: the Hub has answered before, so a lost connection is a DownloadError instead of an
            OfflineError.
    """
    try:
        yield
    except MlxArchError:
        raise
    except Exception as error:
        what = f"{repo}@{revision}" + (f"/{name}" if name else "")
        translated = _access_error(error, what, repo) or _transfer_error(error, what, started)
        if translated is None:
            raise
        raise translated from error


def is_transient(error: Exception) -> bool:
    """Return whether a request that failed may succeed when it is repeated."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code in _TRANSIENT_STATUS
    return "TransportError" in _type_names([error])


def _access_error(error: Exception, what: str, repo: str) -> MlxArchError | None:
    """Translate an error that says that access is refused or something does not exist."""
    from huggingface_hub import constants, errors

    causes = _exception_chain(error)
    type_names = _type_names(causes)
    status = next(
        (c.response.status_code for c in causes if isinstance(c, errors.HfHubHTTPError)), None
    )
    page = f"{constants.ENDPOINT}/{repo}"
    if isinstance(error, errors.GatedRepoError):
        return GatedModel(
            f"{what} asks for an agreement first: sign in at {page}, accept its terms, make a "
            "token there and set HF_TOKEN to it (or run `hf auth login`), then run the same "
            "command again"
        )
    if status == 401 and "RepositoryNotFoundError" not in type_names:
        return GatedModel(
            f"{what}: the Hub refuses the token; set HF_TOKEN to a valid one or unset it"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFound(
            f"{what}: the repository has no such revision; {page} shows those it has"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelNotFound(
            f"{what}: the Hub has no such repository, or it is private; check the spelling, or set "
            "HF_TOKEN"
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return ModelNotFound(f"{what}: the repository has no such file at this revision")
    if isinstance(error, errors.HFValidationError):
        return ModelNotFound(f"{what} is no name of a repository: {error}; write org/name")
    if status in (403, 451):
        return GatedModel(f"{what}: the Hub refuses access ({error}); see {page}")
    return None


def _transfer_error(error: Exception, what: str, started: bool) -> MlxArchError | None:
    """Translate an error of the network or the disk."""
    from huggingface_hub import constants

    causes = _exception_chain(error)
    type_names = _type_names(causes)
    if "OfflineModeIsEnabled" in type_names:
        return OfflineError(
            f"{what} is not on this machine and HF_HUB_OFFLINE is set; unset it to download"
        )
    if any(isinstance(c, OSError) and c.errno in (errno.ENOSPC, errno.EDQUOT) for c in causes):
        return DiskSpaceError(
            f"the disk is full while fetching {what}; free some space and run the command again"
        )
    if type_names & _CONNECTION_ERRORS and not started:
        return OfflineError(
            f"{what}: {constants.ENDPOINT} cannot be reached; check the network, HF_ENDPOINT and "
            "proxies"
        )
    if type_names & _TRANSFER_ERRORS or "Consistency check failed" in str(error):
        return DownloadError(
            f"{what} broke off ({_first_line(error)}); run the same command again: what "
            "arrived is kept"
        )
    return None


def _exception_chain(error: BaseException | None) -> list[BaseException]:
    """Return the exception, its cause, the cause's cause, and so on."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _type_names(errors: list[BaseException]) -> set[str]:
    """Return the names of the exceptions' classes and of their base classes."""
    return {cls.__name__ for error in errors for cls in type(error).__mro__}


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)

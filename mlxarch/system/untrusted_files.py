"""Safe reading of untrusted files: plain names, regular files only, exact reads, bounded JSON."""

import json
import os
import re
import reprlib
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlxarch.errors import CheckpointError, ConfigError, MlxArchError

REMEDY = (
    "The file is damaged or was not made for this: download it again, or make it again with its "
    "converter."
)

_FILE_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_ .,+=@~()\[\]-]*[A-Za-z0-9_)\]])?")
_DEVICES = {
    "CON",
    "PRN",
    "AUX",
    "NUL",
    *(f"{port}{n}" for port in ("COM", "LPT") for n in range(10)),
}
_MAX_READ = 1 << 30  # macOS refuses a read of 2 GiB, Linux cuts it short

_FORMAT = reprlib.Repr()
_FORMAT.maxstring = 200
_FORMAT.maxother = 200
_FORMAT.maxlist = 10
_FORMAT.maxdict = 10


def short_repr(value: object) -> str:
    """Return the ``repr`` of a value from a file for a message: escaped, and truncated if long."""
    return _FORMAT.repr(value)


def join_names(names: Sequence[str], most: int = 5) -> str:
    """Join names for a message: the first ``most``, and the number of others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(short_repr(name) for name in names[:most]) + more


def safe_path(folder: str | os.PathLike[str], name: object) -> Path:
    """Return ``folder / name`` for a name from untrusted data, such as a shard index.

    The file need not exist. A name must be plain: 1 to 255 ASCII letters, digits and
    ``_.,+=@~()[]-`` or blanks, no separator, and no reserved device name. A symbolic link must lead
    to a regular file of the same name, or from one safetensors file to another, so that a hostile
    folder cannot make other files of this machine part of a model; or the Hub's cache made it, from
    ``snapshots/REVISION`` to ``../../blobs`` and from there into the cache's shared ``blobs``.

    Raises:
        CheckpointError: the name is not plain, or it is a link to another place.
    """
    where = f"{folder}: the file name {short_repr(name)}"
    plain = isinstance(name, str) and len(name) <= 255 and _FILE_NAME.fullmatch(name) is not None
    if not isinstance(name, str) or not plain or name.split(".")[0].strip().upper() in _DEVICES:
        raise CheckpointError(
            f"{where} is not a plain one. Allowed are ASCII letters, digits and _.,+=@~()[]- "
            f"without a folder. {REMEDY}"
        )
    path = Path(folder) / name
    if os.path.islink(path) and not (_keeps_name(path) or _is_hub_link(folder, path)):
        raise CheckpointError(
            f"{where} is a symbolic link to {short_repr(os.path.realpath(path))}; links are "
            "followed only to a file of the same name, to a safetensors file, and inside the Hub's "
            "cache. Put the file itself into the folder."
        )
    return path


def _keeps_name(link: Path) -> bool:
    """Whether a link leads to a regular file of its name, or from a safetensors file to another."""
    target = Path(os.path.realpath(link))
    kinds = {link.suffix, target.suffix}
    return target.is_file() and (target.name == link.name or kinds == {".safetensors"})


def _is_hub_link(folder: str | os.PathLike[str], path: Path) -> bool:
    snapshots = os.path.dirname(os.path.realpath(folder))
    repository = os.path.dirname(snapshots)
    blobs = os.path.realpath(os.path.join(repository, "blobs"))
    shared = os.path.realpath(os.path.join(os.path.dirname(repository), "blobs"))
    target = os.path.dirname(os.path.realpath(path))
    return os.path.basename(snapshots) == "snapshots" and (
        target == blobs or os.path.dirname(target) == shared
    )


def open_regular_file(
    path: str | os.PathLike[str], error: type[MlxArchError] = CheckpointError
) -> tuple[int, os.stat_result]:
    """Open a regular file for reading; returns the descriptor and its status.

    O_NONBLOCK keeps a FIFO from blocking the open, and has no effect on regular files.

    Raises:
        error: the file is missing, cannot be opened, or is not a regular file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError as problem:
        raise error(
            f"{path}: the file is missing. Download the model again, or check the path."
        ) from problem
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        remedy = "Check its permissions, and the limit of open files (ulimit -n)."
        raise error(f"{path}: the file cannot be opened: {reason}. {remedy}") from problem
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise error(
            f"{path}: this is not a regular file. Put the file itself there; pipes and devices are "
            "not read."
        )
    return fd, status


def read_exactly(
    fd: int,
    buffer: Any,
    position: int,
    path: str | os.PathLike[str],
    error: type[MlxArchError] = CheckpointError,
) -> None:
    """Fill a writable buffer with the file's bytes from ``position`` on.

    Several threads may read at once. Python resumes reads that a signal interrupts (PEP 475); short
    reads are resumed here.

    Raises:
        error: the file ends early or the device fails.
    """
    view = memoryview(buffer)
    view = view.cast("B") if view.nbytes else view
    done = 0
    while done < view.nbytes:
        try:
            count = os.preadv(fd, [view[done : done + _MAX_READ]], position + done)
        except OSError as problem:
            raise error(
                f"{path}: reading {view.nbytes} bytes at {position} failed: "
                f"{problem.strerror or problem}. "
                "Check the disk or the network drive, then try again."
            ) from problem
        if count == 0:
            raise error(
                f"{path}: the file ends at byte {position + done}, and {view.nbytes} bytes were to "
                "be read from byte "
                f"{position} on. It was cut off or is being written to: download it again."
            )
        done += count


def parse_json(
    text: bytes | bytearray,
    path: str | os.PathLike[str],
    *,
    depth: int,
    values: int,
    error: type[MlxArchError] = CheckpointError,
    integer: Callable[[str], object] = int,
) -> Any:
    """Parse UTF-8 JSON with bounded depth and size, without duplicate keys or lone surrogates.

    Both limits are checked before the parser runs, in time linear in the text, so that a hostile
    file can neither exhaust the stack nor fill the memory.

    Args:
        text: the file's contents.
        path: the file, for messages.
        depth: maximum number of nested levels.
        values: maximum number of values.
        error: exception class to raise.
        integer: converts an integer literal.

    Raises:
        error: the text is not such JSON.
    """

    def refusal(problem: str) -> MlxArchError:
        return error(f"{path}: {problem}. {REMEDY}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise refusal(
                f"the key {short_repr(twice)} is there twice in one JSON object, and may be there "
                "once"
            )
        return fields

    _check_size(text, depth, values, refusal)
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_int=integer)
        if re.search(rb"\\u[dD]", text):
            # fails on a lone surrogate, which no text file can contain
            json.dumps(value, ensure_ascii=False).encode()
    except (json.JSONDecodeError, UnicodeError) as problem:
        raise refusal(f"this is not JSON in UTF-8 ({problem})") from problem
    except ValueError as problem:  # of int(), which reads at most 4300 digits
        raise refusal("the JSON holds a number of thousands of digits") from problem
    return value


_ONE_BRACKET = bytes.maketrans(b"{}", b"[]")
_NO_STRUCTURE = bytes(set(range(256)) - set(b'[]{},"'))


def _check_size(
    text: bytes | bytearray, depth: int, values: int, refusal: Callable[[str], MlxArchError]
) -> None:
    """Refuse too many values or levels, counted after literals and strings are removed."""
    structure = (
        text.replace(b"\\\\", b"").replace(b'\\"', b"").translate(_ONE_BRACKET, _NO_STRUCTURE)
    )
    # Remove empty strings; of two adjacent ones, one is left that encloses the same text.
    structure = structure.replace(b'""', b"")
    too_many = structure.count(b'"') > 4 * values
    if not too_many:
        structure = b"".join(structure.split(b'"')[::2])
        too_many = structure.count(b",") + structure.count(b"[") > values
    if too_many:
        raise refusal(f"the JSON holds more than {values} values, the most that is read")
    brackets = structure.replace(b",", b"")
    for _ in range(depth):  # each round closes the innermost level
        brackets = brackets.replace(b"[]", b"")
    if b"[]" in brackets or brackets.count(b"[") > depth:
        raise refusal(f"the JSON nests deeper than {depth} levels, the most that is read")


def read_json(
    path: str | os.PathLike[str],
    *,
    limit: int = 16 << 20,
    depth: int = 32,
    values: int = 1_000_000,
    error: type[MlxArchError] = ConfigError,
) -> dict[str, Any]:
    """Read the object in a JSON file such as config.json, see ``parse_json``.

    Raises:
        error: it is no regular file, larger than ``limit`` bytes, or not a JSON object.
    """
    fd, status = open_regular_file(path, error)
    try:
        if status.st_size > limit:
            raise error(
                f"{path}: the file has {status.st_size} bytes, and at most {limit} are read. "
                f"{REMEDY}"
            )
        text = bytearray(status.st_size)
        read_exactly(fd, text, 0, path, error)
    finally:
        os.close(fd)
    value = parse_json(text, path, depth=depth, values=values, error=error)
    if not isinstance(value, dict):
        raise error(f"{path}: the JSON is {short_repr(value)}, and must be an object. {REMEDY}")
    return value

"""Saved conversations: JSON files that are validated when read and replaced atomically."""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import msgspec

from mlxarch.errors import InvalidInput
from mlxarch.system import paths

FORMAT_VERSION = 1
MAX_FILE_BYTES = 64 << 20


class Message(msgspec.Struct, omit_defaults=True):
    """One message of a conversation; ``stopped`` marks an answer that Ctrl-C cut short."""

    role: Literal["system", "user", "assistant"]
    content: str
    stopped: bool = False


class _Header(msgspec.Struct):
    """The version alone, decoded before the rest of the file."""

    version: Any


class SavedChat(msgspec.Struct):
    """Content of a saved conversation.

    Attributes:
        version: ``FORMAT_VERSION``.
        model: name of the model.
        saved: time in ISO 8601.
        settings: values of ``/set``, by name.
        messages: the messages, first the system prompt if there is one.
    """

    version: int
    model: str
    saved: str
    settings: dict[str, Any]
    messages: list[Message]


def chats_folder() -> Path:
    """Return the folder of saved conversations."""
    return paths.state() / "chats"


def expand_path(name: str) -> Path:
    """Expand ~ in a path that a person typed; raises InvalidInput if there is no such user."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise InvalidInput(f"{name}: {error}") from error


def find_chat(name: str) -> Path:
    """Find a file by its path or by its name in ``chats_folder``; a missing one is the path."""
    path = expand_path(name)
    candidates = [path]
    if path.parent == Path():
        candidates += [chats_folder() / name, chats_folder() / f"{name}.json"]
    return next((candidate for candidate in candidates if candidate.is_file()), path)


def read_chat(path: Path) -> SavedChat:
    """Read a saved conversation.

    Raises:
        InvalidInput: the file does not exist, is too large, cannot be read, or is malformed.
    """
    try:
        if not path.is_file():
            raise InvalidInput(
                f"{path}: there is no such file; /load without a name lists the saved conversations"
            )
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidInput(
                f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB, so it is no saved conversation"
            )
        data = path.read_bytes()
        version = msgspec.json.decode(data, type=_Header).version
        if type(version) is not int or version != FORMAT_VERSION:
            raise InvalidInput(
                f"{path}: version {version!r} is not known; "
                f"this release reads version {FORMAT_VERSION}"
            )
        return msgspec.json.decode(data, type=SavedChat)
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror or error}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"{path} is no saved conversation: {error}") from error


def write_chat(path: Path, data: bytes) -> None:
    """Write a file atomically, readable by its owner only.

    Raises:
        OSError: the file cannot be written; an old one is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise

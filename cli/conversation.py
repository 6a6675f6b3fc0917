"""A conversation: its messages, its settings, its caches; and how it is kept in a file."""

import contextlib
import math
import os
import shlex
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from mlxarch import paths
from mlxarch.cli.answer import STOPPED, Answer, receive
from mlxarch.cli.options import EFFORTS, SAMPLING
from mlxarch.cli.render import Writer
from mlxarch.errors import InvalidInput, OutputError

if TYPE_CHECKING:
    from mlxarch.generation import Timings
    from mlxarch.language_model import LanguageModel
    from mlxarch.sampling import Sampling
    from mlxarch.thinking import Switches

VERSION = 1
MAX_FILE = 64 << 20  # bytes


class Message(msgspec.Struct, omit_defaults=True):
    """What somebody said; ``stopped``: Ctrl-C ended it."""

    role: Literal["system", "user", "assistant"]
    content: str
    stopped: bool = False


class _Head(msgspec.Struct):
    version: Any


class Saved(msgspec.Struct):
    """The file of a conversation; ``saved`` is the time, in ISO 8601."""

    version: int
    model: str
    saved: str
    settings: dict[str, Any]
    messages: list[Message]


def _number(text: str) -> float:
    value = float(text)
    if math.isnan(value):
        raise ValueError
    return value


def _on_off(text: str) -> bool:
    return {"on": True, "off": False}[text.lower()]


def _effort(text: str) -> str:
    return {level: level for level in EFFORTS}[text.lower()]


_READERS: dict[str, Callable[[str], Any]] = {
    **{"temperature": _number, "top_p": _number, "min_p": _number, "repetition_penalty": _number},
    **{"top_k": int, "seed": int, "max_tokens": int, "stop": shlex.split, "think": _on_off, "effort": _effort},
}
_KINDS = {int: "a whole number", _number: "a number", _on_off: "on or off", _effort: "low, medium or high"}
_OPTIONAL = {"seed": None, "max_tokens": None, "stop": [], "think": None, "effort": None}
SETTINGS = (*_READERS,)


class Conversation:
    """Messages so far, and the one session that holds their keys and values.

    Attributes:
        system: the system prompt, or None.
        messages: of user and assistant, in turns.
        sampling, max_tokens, stop, think, effort: the settings.
        overflow: see ``LanguageModel.stream``.
        file: where it was saved or loaded last, or None.
        timings: of every answer, also of those that were taken back.
    """

    def __init__(
        self, model: "LanguageModel", name: str, sampling: "Sampling", system: str | None, max_tokens: int | None
    ) -> None:
        self.model, self.name, self.sampling, self.max_tokens = model, name, sampling, max_tokens
        self.stop: list[str] = []
        self.think: bool | None = None
        self.effort: str | None = None
        self.overflow: Literal["refuse", "keep-ends"] = "refuse"
        self.messages: list[Message] = []
        self.file: Path | None = None
        self.timings: list[Timings] = []
        self._session = model.session()
        self.set_system(system)

    def set_system(self, text: str | None) -> None:
        """Change the system prompt; raises InvalidInput where the model has no template to place it."""
        if text is not None and not self.model.tokenizer.has_chat_template:
            raise InvalidInput(f"{self.name} has no chat template, so there is no place for a system prompt")
        self.system = text

    def switches(self) -> "Switches":
        """How the model is asked to think, or not to."""
        from mlxarch.thinking import switches

        return switches(self.model.tokenizer, self.think, self.effort)

    def ask(self, text: str, writer: Writer, thoughts: Writer | None = None) -> Answer:
        """Let the model answer. A question that gets no answer, for an error or an interrupt, is forgotten."""
        before = list(self.messages)
        self.messages.append(Message("user", text))
        try:
            answer = self._answer(writer, thoughts)
        except BaseException:
            self.messages = before
            raise
        self.messages.append(Message("assistant", answer.text, stopped=answer.finish_reason == STOPPED))
        self.timings.append(answer.timings)
        return answer

    def retry(self, writer: Writer, thoughts: Writer | None = None) -> Answer:
        """Ask the last question again; its old answer stays if there comes no new one.

        Raises:
            InvalidInput: there is no question yet.
        """
        before = list(self.messages)
        question = self.undo()
        if question is None:
            raise InvalidInput("there is no question yet")
        try:
            return self.ask(question, writer, thoughts)
        except BaseException:
            self.messages = before
            raise

    def _answer(self, writer: Writer, thoughts: Writer | None) -> Answer:
        settings: dict[str, Any] = {"max_tokens": self.max_tokens, "stop": self.stop, "sampling": self.sampling}
        settings |= {"template": self.switches().variables, "overflow": self.overflow}
        pieces = self.model.stream(self.prompt(), session=self._session, **settings)
        try:
            return receive(pieces, writer, thoughts)
        except BaseException:
            self._session = self.model.session()  # the old one may have been left in the midst of a step
            raise

    def prompt(self) -> str | list[dict[str, str]]:
        """What the model is given: messages without earlier thinking, or the text so far without a chat template."""
        if self.model.tokenizer.has_chat_template:
            system = self.switches().system(self.system)
            return [{"role": message.role, "content": message.content} for message in self._all(system)]
        return "".join(
            message.content if message.role == "user" else message.content + "\n" for message in self.messages
        )

    def undo(self) -> str | None:
        """Forget the last question and its answer, and return the question; None if there was none."""
        while self.messages:
            message = self.messages.pop()
            if message.role == "user":
                return message.content
        return None

    def clear(self) -> None:
        """Forget all messages; the system prompt and the settings stay."""
        self.messages, self.file = [], None

    def settings(self) -> dict[str, Any]:
        """By name, in the order of /help."""
        sampling = {name: getattr(self.sampling, name) for name in SAMPLING}
        values = {**sampling, "max_tokens": self.max_tokens, "stop": list(self.stop)}
        values |= {"think": self.think, "effort": self.effort}
        return {name: values[name] for name in SETTINGS}

    def set(self, name: str, text: str) -> None:
        """Change a setting; "none" takes away a limit, the seed, the stop strings, or what was said of the thinking.

        Raises:
            InvalidInput: the text does not say a value that the setting can have.
        """
        if text.lower() == "none" and name in _OPTIONAL:
            value = _OPTIONAL[name]
        else:
            try:
                value = _READERS[name](text)
            except (ValueError, KeyError):
                what = _KINDS.get(_READERS[name], "texts, quoted where they hold blanks")
                raise InvalidInput(f"{name} must be {what}, found {text!r}") from None
        self._apply({name: value})

    def _apply(self, values: dict[str, Any]) -> None:
        sampling = replace(self.sampling, **{name: value for name, value in values.items() if name in SAMPLING})
        limit, stop = values.get("max_tokens", self.max_tokens), values.get("stop", self.stop)
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise InvalidInput(f"max_tokens must be a whole number from 1 on, or none; found {limit!r}")
        if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
            raise InvalidInput(f"stop must be texts that are not empty; found {stop!r}")
        think, effort = values.get("think", self.think), values.get("effort", self.effort)
        if not isinstance(think, bool | None):
            raise InvalidInput(f"think must be on or off; found {think!r}")
        if effort is not None and effort not in EFFORTS:
            raise InvalidInput(f"effort must be low, medium or high; found {effort!r}")
        self.sampling, self.max_tokens, self.stop, self.think, self.effort = sampling, limit, stop, think, effort

    def _all(self, system: str | None) -> list[Message]:
        return [*([] if system is None else [Message("system", system)]), *self.messages]

    def save(self, path: Path | None) -> Path:
        """Write it, all or nothing, for its owner alone; without a path where it was, or under a new name.

        Raises:
            OutputError: the file exists and is not this conversation's, or it cannot be written.
        """
        now = datetime.now(UTC).astimezone().replace(microsecond=0)
        if path is None:
            name = self.name.strip("/.").replace("/", "--")[-80:]
            path = self.file or chats() / f"{now:%Y-%m-%d_%H%M%S}_{name}.json"
        if path.exists() and path != self.file:
            raise OutputError(f"{path} exists; choose another name, or remove it first")
        saved = Saved(VERSION, self.name, now.isoformat(), self.settings(), self._all(self.system))
        try:
            _write(path, msgspec.json.format(msgspec.json.encode(saved), indent=2) + b"\n")
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
        self.file = path
        return path

    def load(self, path: Path) -> Saved:
        """Go on with a conversation from a file. On an error, this one stays as it is.

        Raises:
            InvalidInput: there is no such file, or it is not a conversation's.
        """
        saved = _read(path)
        first = saved.messages[0] if saved.messages else None
        system = first.content if first and first.role == "system" else None
        turns = saved.messages[0 if system is None else 1 :]
        for index, message in enumerate(turns):
            if message.role != ("user", "assistant")[index % 2]:
                raise InvalidInput(f"{path}: message {index + 1} is by {message.role!r}; user and assistant take turns")
        if len(turns) % 2:
            raise InvalidInput(f"{path}: the last message has no answer; remove it, or add one")
        if unknown := saved.settings.keys() - _READERS.keys():
            raise InvalidInput(f"{path}: setting {min(unknown)!r} is not known; known are {', '.join(SETTINGS)}")
        before = self.system
        self.set_system(system)
        try:
            self._apply(saved.settings)
        except InvalidInput as error:
            self.system = before
            raise InvalidInput(f"{path}: {error}") from error
        self.messages, self.file = turns, path
        return saved


def chats() -> Path:
    """The folder of saved conversations."""
    return paths.state() / "chats"


def as_path(name: str) -> Path:
    """The path that a person typed; raises InvalidInput where its ~ stands for nobody."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise InvalidInput(f"{name}: {error}") from error


def find(name: str) -> Path:
    """The file that a person means: a path, or a name among the saved conversations."""
    path = as_path(name)
    candidates = [path, *([] if path.parent != Path() else [chats() / name, chats() / f"{name}.json"])]
    return next((candidate for candidate in candidates if candidate.is_file()), path)


def _read(path: Path) -> Saved:
    try:
        if not path.is_file():
            raise InvalidInput(f"{path}: there is no such file; /load without a name lists the saved conversations")
        if path.stat().st_size > MAX_FILE:
            raise InvalidInput(f"{path} is larger than {MAX_FILE >> 20} MiB, so it is no saved conversation")
        data = path.read_bytes()
        version = msgspec.json.decode(data, type=_Head).version
        if type(version) is not int or version != VERSION:
            raise InvalidInput(f"{path}: version {version!r} is not known; this release reads version {VERSION}")
        return msgspec.json.decode(data, type=Saved)
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror or error}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"{path} is no saved conversation: {error}") from error


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}-")  # made for its owner alone
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

"""A conversation: its messages, its settings and its KV cache, with saving and loading."""

import math
import shlex
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from mlxarch.cli.chat.receive import STOPPED, Answer, receive_answer
from mlxarch.cli.chat.saved_chats import (
    FORMAT_VERSION,
    Message,
    SavedChat,
    chats_folder,
    read_chat,
    write_chat,
)
from mlxarch.cli.options import SAMPLING_NAMES
from mlxarch.cli.prompt_progress import PromptProgress
from mlxarch.cli.render import Writer
from mlxarch.errors import InvalidInput, OutputError
from mlxarch.generation.answer import whole_answer
from mlxarch.generation.thinking.switches import EFFORTS, Switches, switches

if TYPE_CHECKING:
    from mlxarch.generation.sampling import Sampling
    from mlxarch.generation.timings import Timings
    from mlxarch.language_model import LanguageModel


def _parse_number(text: str) -> float:
    value = float(text)
    if math.isnan(value):
        raise ValueError
    return value


def _parse_on_off(text: str) -> bool:
    return {"on": True, "off": False}[text.lower()]


def _parse_effort(text: str) -> str:
    return {level: level for level in EFFORTS}[text.lower()]


_PARSERS: dict[str, Callable[[str], Any]] = {
    "temperature": _parse_number,
    "top_p": _parse_number,
    "min_p": _parse_number,
    "repetition_penalty": _parse_number,
    "top_k": int,
    "seed": int,
    "max_tokens": int,
    "stop": shlex.split,
    "think": _parse_on_off,
    "effort": _parse_effort,
}
_EFFORTS_TEXT = f"{', '.join(EFFORTS[:-1])} or {EFFORTS[-1]}"
_EXPECTED = {
    int: "a whole number",
    _parse_number: "a number",
    _parse_on_off: "on or off",
    _parse_effort: _EFFORTS_TEXT,
}
_VALUE_OF_NONE = {"seed": None, "max_tokens": None, "stop": [], "think": None, "effort": None}
SETTING_NAMES = (*_PARSERS,)


class Conversation:
    """The messages so far, and a session with their KV cache.

    Attributes:
        model: the model.
        name: the model's name, as the user gave it.
        system: the system prompt, or None.
        messages: messages of user and assistant, in turns.
        sampling, max_tokens, stop, think, effort: the settings.
        overflow, loop_guard: see ``LanguageModel.stream``.
        file: the file it was last saved to or loaded from, or None.
        timings: timings of every answer, including answers taken back.
    """

    def __init__(
        self,
        model: "LanguageModel",
        name: str,
        sampling: "Sampling",
        system: str | None,
        max_tokens: int | None,
    ) -> None:
        self.model = model
        self.name = name
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.stop: list[str] = []
        self.think: bool | None = None
        self.effort: str | None = None
        self.overflow: Literal["refuse", "keep-ends"] = "refuse"
        self.loop_guard = True
        self.messages: list[Message] = []
        self.file: Path | None = None
        self.timings: list[Timings] = []
        self._session = model.session()
        self.set_system(system)

    def set_system(self, text: str | None) -> None:
        """Change the system prompt; raises InvalidInput if the model has no chat template."""
        if text is not None and not self.model.tokenizer.has_chat_template:
            raise InvalidInput(
                f"{self.name} has no chat template, so there is no place for a system prompt"
            )
        self.system = text

    def thinking_switches(self) -> Switches:
        """Return the chat template's switches for the settings think and effort."""
        return switches(self.model.tokenizer, self.think, self.effort)

    def ask(self, text: str, writer: Writer, thinking_writer: Writer | None = None) -> Answer:
        """Ask a question and write the answer; after an error or interrupt, forget the question."""
        before = list(self.messages)
        self.messages.append(Message("user", text))
        try:
            answer = self._generate_answer(writer, thinking_writer)
        except BaseException:
            self.messages = before
            raise
        _, content = whole_answer(self.model.tokenizer, answer.thinking, answer.text)
        self.messages.append(Message("assistant", content, stopped=answer.finish_reason == STOPPED))
        self.timings.append(answer.timings)
        return answer

    def retry(self, writer: Writer, thinking_writer: Writer | None = None) -> Answer:
        """Ask the last question again; after an error or interrupt, keep the old answer.

        Raises:
            InvalidInput: there is no question yet.
        """
        before = list(self.messages)
        question = self.undo()
        if question is None:
            raise InvalidInput("there is no question yet")
        try:
            return self.ask(question, writer, thinking_writer)
        except BaseException:
            self.messages = before
            raise

    def _generate_answer(self, writer: Writer, thinking_writer: Writer | None) -> Answer:
        progress = PromptProgress()
        pieces = self.model.stream(
            self.prompt(),
            session=self._session,
            max_tokens=self.max_tokens,
            stop=self.stop,
            sampling=self.sampling,
            template=self.thinking_switches().variables,
            overflow=self.overflow,
            loop_guard=self.loop_guard,
            on_prompt=progress,
            parse_special=False,
        )
        try:
            return receive_answer(pieces, writer, thinking_writer, progress)
        except BaseException:
            # the old session may have been interrupted within a step
            self._session = self.model.session()
            raise

    def prompt(self) -> str | list[dict[str, str]]:
        """Return the model's input: messages without earlier thinking.

        Without a chat template, it is the text so far.
        """
        if self.model.tokenizer.has_chat_template:
            system = self.thinking_switches().system(self.system)
            return [
                {"role": message.role, "content": message.content}
                for message in self._all_messages(system)
            ]
        return "".join(
            message.content if message.role == "user" else message.content + "\n"
            for message in self.messages
        )

    def undo(self) -> str | None:
        """Forget the last question and its answer; return the question, or None without one."""
        while self.messages:
            message = self.messages.pop()
            if message.role == "user":
                return message.content
        return None

    def clear(self) -> None:
        """Forget all messages, but neither the system prompt nor the settings."""
        self.messages = []
        self.file = None

    def settings(self) -> dict[str, Any]:
        """Return the settings by name, in the order of ``SETTING_NAMES``."""
        sampling = {name: getattr(self.sampling, name) for name in SAMPLING_NAMES}
        values = {
            **sampling,
            "max_tokens": self.max_tokens,
            "stop": list(self.stop),
            "think": self.think,
            "effort": self.effort,
        }
        return {name: values[name] for name in SETTING_NAMES}

    def set(self, name: str, text: str) -> None:
        """Change a setting to a value given as text; "none" unsets an optional one.

        Raises:
            InvalidInput: the text is not a valid value of the setting.
        """
        if text.lower() == "none" and name in _VALUE_OF_NONE:
            value = _VALUE_OF_NONE[name]
        else:
            try:
                value = _PARSERS[name](text)
            except (ValueError, KeyError):
                expected = _EXPECTED.get(_PARSERS[name], "texts, quoted where they hold blanks")
                raise InvalidInput(f"{name} must be {expected}, found {text!r}") from None
        self._apply({name: value})

    def _apply(self, values: dict[str, Any]) -> None:
        """Validate and apply settings; on an error, none of them changes."""
        sampling = replace(
            self.sampling,
            **{name: value for name, value in values.items() if name in SAMPLING_NAMES},
        )
        max_tokens = values.get("max_tokens", self.max_tokens)
        stop = values.get("stop", self.stop)
        think = values.get("think", self.think)
        effort = values.get("effort", self.effort)
        if max_tokens is not None and (
            not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1
        ):
            raise InvalidInput(
                f"max_tokens must be a whole number from 1 on, or none; found {max_tokens!r}"
            )
        if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
            raise InvalidInput(f"stop must be texts that are not empty; found {stop!r}")
        if not isinstance(think, bool | None):
            raise InvalidInput(f"think must be on or off; found {think!r}")
        if effort is not None and effort not in EFFORTS:
            raise InvalidInput(f"effort must be {_EFFORTS_TEXT}; found {effort!r}")
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.stop = stop
        self.think = think
        self.effort = effort

    def _all_messages(self, system: str | None) -> list[Message]:
        return [*([] if system is None else [Message("system", system)]), *self.messages]

    def save(self, path: Path | None) -> Path:
        """Save the conversation atomically, readable by its owner only, and return the path.

        Args:
            path: the file; None for the file it was last saved to or loaded from, or a new one.

        Raises:
            OutputError: the file exists and is not this conversation's, or cannot be written.
        """
        now = datetime.now(UTC).astimezone().replace(microsecond=0)
        if path is None:
            name = self.name.strip("/.").replace("/", "--")[-80:]
            path = self.file or chats_folder() / f"{now:%Y-%m-%d_%H%M%S}_{name}.json"
        if path.exists() and path != self.file:
            raise OutputError(f"{path} exists; choose another name, or remove it first")
        saved = SavedChat(
            FORMAT_VERSION,
            self.name,
            now.isoformat(),
            self.settings(),
            self._all_messages(self.system),
        )
        try:
            write_chat(path, msgspec.json.format(msgspec.json.encode(saved), indent=2) + b"\n")
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
        self.file = path
        return path

    def load(self, path: Path) -> SavedChat:
        """Replace this conversation by a saved one; on an error, nothing changes.

        Raises:
            InvalidInput: the file does not exist, or is not a saved conversation.
        """
        saved = read_chat(path)
        first = saved.messages[0] if saved.messages else None
        system = first.content if first and first.role == "system" else None
        turns = saved.messages[0 if system is None else 1 :]
        for index, message in enumerate(turns):
            if message.role != ("user", "assistant")[index % 2]:
                raise InvalidInput(
                    f"{path}: message {index + 1} is by {message.role!r}; "
                    "user and assistant take turns"
                )
        if len(turns) % 2:
            raise InvalidInput(f"{path}: the last message has no answer; remove it, or add one")
        if unknown := saved.settings.keys() - _PARSERS.keys():
            raise InvalidInput(
                f"{path}: setting {min(unknown)!r} is not known; "
                f"known are {', '.join(SETTING_NAMES)}"
            )
        previous_system = self.system
        self.set_system(system)
        try:
            self._apply(saved.settings)
        except InvalidInput as error:
            self.system = previous_system
            raise InvalidInput(f"{path}: {error}") from error
        self.messages = turns
        self.file = path
        return saved

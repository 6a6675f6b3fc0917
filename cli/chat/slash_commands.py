"""Slash commands of a chat: their table, and their handlers."""

import difflib
import re
from collections.abc import Callable
from typing import Protocol

from mlxarch.cli.chat import conversation, saved_chats
from mlxarch.cli.chat.receive import Answer
from mlxarch.cli.output import print_line, print_stderr
from mlxarch.cli.render import Writer
from mlxarch.cli.stats import memory_line, streaming_line, timings_line
from mlxarch.errors import InvalidInput
from mlxarch.generation.thinking.switches import switches


class Chat(Protocol):
    """The chat that commands act on.

    Attributes:
        conversation: messages and settings.
        stats: whether a line of timings follows each answer.
        done: whether the chat is over.
    """

    conversation: conversation.Conversation
    stats: bool
    done: bool

    def answer(self, ask: Callable[[Writer, Writer], Answer]) -> None:
        """Write the answer that ``ask`` gets, given writers of the answer and of the thinking."""
        ...


Handler = Callable[[Chat, str], None]
COMMANDS: dict[str, tuple[str, str, Handler]] = {}
"""Usage, description and handler of each command, by its name."""
ALIASES = {"/quit": "/exit", "/bye": "/exit", "/?": "/help"}


def is_slash_command(text: str) -> bool:
    """Return whether an input is meant as a command: a path such as /usr/bin is not."""
    return re.match(r"/[A-Za-z?]+(\s|$)", text) is not None


def run_slash_command(chat: Chat, line: str) -> None:
    """Run the command in a line that begins with a slash.

    Raises:
        InvalidInput: the command does not exist, or does not accept its argument.
    """
    name, _, argument = line.partition(" ")
    name = ALIASES.get(name.lower(), name.lower())
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, [*COMMANDS, *ALIASES], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "/help lists them."
        raise InvalidInput(
            f"no command is called {name}; {hint} A text that begins with a slash is sent with //"
        )
    handler = COMMANDS[name][2]
    handler(chat, argument.strip())


def _register(usage: str, description: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        COMMANDS[usage.split()[0]] = (usage, description, handler)
        return handler

    return register


@_register("/help", "show this list")
def _help(_chat: Chat, _: str) -> None:
    width = max(len(usage) for usage, _description, _handler in COMMANDS.values())
    for usage, description, _handler in COMMANDS.values():
        print_stderr(f"  {usage:{width}}  {description}")
    print_stderr(
        "\nEnter sends. Alt-Enter or Ctrl-J begins a new line, and so does Enter inside "
        'a text that begins with """; a paste keeps its lines.'
    )
    print_stderr(
        "Ctrl-C stops an answer and keeps its beginning; at the prompt it clears the line, "
        "and pressed twice it ends the chat."
    )


@_register("/set [NAME VALUE]", "show the settings, or change one; the value none unsets it")
def _set(chat: Chat, argument: str) -> None:
    talk = chat.conversation
    name, _, value = argument.partition(" ")
    name = name.lower().replace("-", "_")
    name = {"temp": "temperature"}.get(name, name)
    value = value.strip()
    if not name:
        for key, held in talk.settings().items():
            print_stderr(f"  {key:18}  {_format_value(held)}")
        print_stderr(f"  {'system':18}  {talk.system or 'none'}")
    elif name == "system":
        _system(chat, value)
    elif name not in conversation.SETTING_NAMES:
        near = difflib.get_close_matches(name, conversation.SETTING_NAMES, n=1)
        known = ", ".join(conversation.SETTING_NAMES)
        hint = f"did you mean {near[0]}?" if near else f"there are {known}, system"
        raise InvalidInput(f"no setting is called {name!r}; {hint}")
    elif not value:
        print_stderr(f"  {name}  {_format_value(talk.settings()[name])}")
    else:
        talk.set(name, value)
        print_stderr(f"  {name}  {_format_value(talk.settings()[name])}", dim=True)
        if name in ("think", "effort"):
            setting = {name: talk.settings()[name]}
            for warning in switches(talk.model.tokenizer, **setting).warnings:
                print_stderr(f"{talk.name} {warning}")


@_register("/system [TEXT]", "show or change the system prompt; the value none removes it")
def _system(chat: Chat, text: str) -> None:
    talk = chat.conversation
    if not text:
        print_stderr(talk.system or "there is no system prompt")
        return
    talk.set_system(None if text.lower() == "none" else text)
    print_stderr(
        "the system prompt is removed" if talk.system is None else "the system prompt is set",
        dim=True,
    )


@_register("/clear", "forget the conversation; keep the settings and the system prompt")
def _clear(chat: Chat, _: str) -> None:
    chat.conversation.clear()
    print_stderr("the conversation begins anew", dim=True)


@_register("/retry", "answer the last question again")
def _retry(chat: Chat, _: str) -> None:
    sampling = chat.conversation.sampling
    if sampling.temperature == 0 or sampling.seed is not None:
        fixed = "temperature is 0" if sampling.temperature == 0 else "the seed is fixed"
        print_stderr(f"{fixed}, so the answer will be the same; /set changes it", dim=True)
    chat.answer(chat.conversation.retry)


@_register("/undo", "forget the last question and its answer")
def _undo(chat: Chat, _: str) -> None:
    question = chat.conversation.undo()
    if question is None:
        raise InvalidInput("there is no question yet")
    print_stderr(f"forgotten: {_shorten(question)}", dim=True)


@_register("/raw", "show the last answer as the model wrote it, without rendering")
def _raw(chat: Chat, _: str) -> None:
    messages = chat.conversation.messages
    if not messages:
        raise InvalidInput("there is no answer yet")
    print_line(messages[-1].content)


@_register("/model", "show the model")
def _model(chat: Chat, name: str) -> None:
    talk = chat.conversation
    if name:
        raise InvalidInput(
            f"a chat keeps its model; `mlxarch chat {name}` begins one with another, and /save here "
            "with /load there takes the conversation along"
        )
    print_stderr(f"{talk.name}: {talk.model.path}")
    print_stderr(f"{talk.model!r}", dim=True)


@_register("/save [FILE]", "save the conversation to a file")
def _save(chat: Chat, name: str) -> None:
    path = chat.conversation.save(saved_chats.expand_path(name) if name else None)
    print_stderr(f"saved to {path}", dim=True)


@_register("/load [FILE]", "continue a saved conversation, or list the saved ones")
def _load(chat: Chat, name: str) -> None:
    talk = chat.conversation
    if not name:
        folder = saved_chats.chats_folder()
        names = sorted(file.name for file in folder.glob("*.json"))
        print_stderr(
            "\n".join(f"  {file}" for file in names) or f"nothing is saved in {folder} yet"
        )
        return
    saved = talk.load(saved_chats.find_chat(name))
    other = f"; it was held with {saved.model}" if saved.model != talk.name else ""
    print_stderr(f"{len(talk.messages)} messages{other}", dim=True)
    if talk.messages:
        print_stderr(f"the last question: {_shorten(talk.messages[-2].content)}", dim=True)


@_register(
    "/stats [on|off]", "show timings of the last answer, or switch them on after each answer"
)
def _stats(chat: Chat, argument: str) -> None:
    if argument:
        if argument not in ("on", "off"):
            raise InvalidInput(f"/stats takes on or off, found {argument!r}")
        chat.stats = argument == "on"
        return
    talk = chat.conversation
    if not talk.timings:
        print_stderr("there is no answer yet")
        return
    last = talk.timings[-1]
    tokens = sum(timings.generated_tokens for timings in talk.timings)
    seconds = sum(timings.prefill_seconds + timings.decode_seconds for timings in talk.timings)
    print_stderr(timings_line(last, long=True))
    print_stderr(f"{len(talk.timings)} answers · {tokens} tokens in {seconds:.1f} s", dim=True)
    print_stderr(
        f"context {last.prompt_tokens + last.generated_tokens} of {talk.model.context_length} "
        "tokens after the last answer",
        dim=True,
    )
    print_stderr(memory_line(talk.model), dim=True)
    if streaming := streaming_line(talk.model):
        print_stderr(streaming, dim=True)


@_register("/exit", "end the chat; also /quit, /bye and Ctrl-D")
def _exit(chat: Chat, _: str) -> None:
    chat.done = True


def _format_value(value: object) -> object:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value in (None, []) else value


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 70 else f"{line[:69]}…"

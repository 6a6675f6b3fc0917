"""The commands of a chat: what begins with a slash."""

import difflib
from collections.abc import Callable
from typing import Protocol

from mlxarch.cli import conversation
from mlxarch.cli.answer import Answer
from mlxarch.cli.output import say
from mlxarch.cli.render import Writer
from mlxarch.cli.stats import memory_line, stats_line, streaming_line
from mlxarch.errors import InvalidInput
from mlxarch.thinking import switches


class Chat(Protocol):
    """What the commands act upon; ``stats``: a line about the speed after each answer, ``done``: leave."""

    conversation: conversation.Conversation
    stats: bool
    done: bool

    def answer(self, ask: Callable[[Writer, Writer], Answer]) -> None:
        """Let ``ask`` write an answer."""
        ...


Handler = Callable[[Chat, str], None]
COMMANDS: dict[str, tuple[str, str, Handler]] = {}  # name -> usage, what it does, how
ALIASES = {"/quit": "/exit", "/bye": "/exit", "/?": "/help"}


def obey(chat: Chat, line: str) -> None:
    """Do what a line that begins with a slash says.

    Raises:
        InvalidInput: there is no such command, or its argument will not do.
    """
    name, _, argument = line.partition(" ")
    name = ALIASES.get(name.lower(), name.lower())
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, [*COMMANDS, *ALIASES], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "/help lists them."
        raise InvalidInput(f"no command is called {name}; {hint} A text that begins with a slash is sent with //")
    COMMANDS[name][2](chat, argument.strip())


def _command(usage: str, text: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        COMMANDS[usage.split()[0]] = (usage, text, handler)
        return handler

    return register


@_command("/help", "this list")
def _help(_chat: Chat, _: str) -> None:
    width = max(len(command[0]) for command in COMMANDS.values())
    for usage, text, *_rest in COMMANDS.values():
        say(f"  {usage:{width}}  {text}")
    say('\nEnter sends. Alt-Enter or Ctrl-J begins a new line, as do """ around a text; a paste keeps its lines.')
    say("Ctrl-C stops an answer, which stays as far as it came; at the prompt it clears the line, twice it ends.")


@_command("/set [NAME VALUE]", "show the settings, or change one; none takes it away where that makes sense")
def _set(chat: Chat, argument: str) -> None:
    talk = chat.conversation
    name, _, value = argument.partition(" ")
    name = {"temp": "temperature"}.get(name := name.lower().replace("-", "_"), name)
    if not name:
        for key, held in talk.settings().items():
            say(f"  {key:18}  {_shown(held)}")
        say(f"  {'system':18}  {talk.system or 'none'}")
    elif name == "system":
        _system(chat, value.strip())
    elif name not in conversation.SETTINGS:
        near = difflib.get_close_matches(name, conversation.SETTINGS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(conversation.SETTINGS)}, system"
        raise InvalidInput(f"no setting is called {name!r}; {hint}")
    elif not value.strip():
        say(f"  {name}  {_shown(talk.settings()[name])}")
    else:
        talk.set(name, value.strip())
        say(f"  {name}  {_shown(talk.settings()[name])}", dim=True)
        if name in ("think", "effort"):
            for warning in switches(talk.model.tokenizer, **{name: talk.settings()[name]}).warnings:
                say(f"{talk.name} {warning}")


@_command("/system [TEXT]", "show the system prompt, or change it; none takes it away")
def _system(chat: Chat, text: str) -> None:
    talk = chat.conversation
    if not text:
        say(talk.system or "there is no system prompt")
        return
    talk.set_system(None if text.lower() == "none" else text)
    say("the system prompt is taken away" if talk.system is None else "the system prompt is set", dim=True)


@_command("/clear", "forget the conversation; the settings and the system prompt stay")
def _clear(chat: Chat, _: str) -> None:
    chat.conversation.clear()
    say("the conversation begins anew", dim=True)


@_command("/retry", "answer the last question again")
def _retry(chat: Chat, _: str) -> None:
    sampling = chat.conversation.sampling
    if sampling.temperature == 0 or sampling.seed is not None:
        fixed = "temperature is 0" if sampling.temperature == 0 else "the seed is fixed"
        say(f"{fixed}, so the answer will be the same; /set changes it", dim=True)
    chat.answer(chat.conversation.retry)


@_command("/undo", "forget the last question and its answer")
def _undo(chat: Chat, _: str) -> None:
    question = chat.conversation.undo()
    if question is None:
        raise InvalidInput("there is no question yet")
    say(f"forgotten: {_short(question)}", dim=True)


@_command("/save [FILE]", "keep the conversation in a file")
def _save(chat: Chat, name: str) -> None:
    say(f"saved to {chat.conversation.save(conversation.as_path(name) if name else None)}", dim=True)


@_command("/load [FILE]", "go on with a conversation from a file, or list those that were saved")
def _load(chat: Chat, name: str) -> None:
    talk = chat.conversation
    if not name:
        names = sorted(file.name for file in conversation.chats().glob("*.json"))
        say("\n".join(f"  {file}" for file in names) or f"nothing is saved in {conversation.chats()} yet")
        return
    saved = talk.load(conversation.find(name))
    other = f"; it was held with {saved.model}" if saved.model != talk.name else ""
    say(f"{len(talk.messages)} messages{other}", dim=True)
    if talk.messages:
        say(f"the last question: {_short(talk.messages[-2].content)}", dim=True)


@_command("/stats [on|off]", "how fast the last answer was; on, off: a line after each answer")
def _stats(chat: Chat, argument: str) -> None:
    if argument:
        if argument not in ("on", "off"):
            raise InvalidInput(f"/stats takes on or off, found {argument!r}")
        chat.stats = argument == "on"
    elif not (done := chat.conversation.timings):
        say("there is no answer yet")
    else:
        say(stats_line(done[-1], long=True))
        tokens, seconds = sum(t.generated_tokens for t in done), sum(t.prefill_seconds + t.decode_seconds for t in done)
        held = done[-1].prompt_tokens + done[-1].generated_tokens
        say(f"{len(done)} answers · {tokens} tokens in {seconds:.1f} s", dim=True)
        say(f"context {held} of {chat.conversation.model.context_length} tokens after the last answer", dim=True)
        say(memory_line(chat.conversation.model), dim=True)
        if streamed := streaming_line(chat.conversation.model):
            say(streamed, dim=True)


@_command("/exit", "leave; so do /quit, /bye and Ctrl-D")
def _exit(chat: Chat, _: str) -> None:
    chat.done = True


def _shown(value: object) -> object:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value in (None, []) else value


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 70 else f"{line[:69]}…"

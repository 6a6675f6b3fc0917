"""``mlxarch chat``: a conversation on the terminal."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import click

from mlxarch import paths
from mlxarch.cli import options
from mlxarch.cli.answer import STOPPED, Answer, left_out
from mlxarch.cli.conversation import Conversation
from mlxarch.cli.editor import Editor, Interrupted, Lines, editor
from mlxarch.cli.output import is_terminal, say
from mlxarch.cli.render import Writer, thoughts, writer
from mlxarch.cli.signals import Terminated
from mlxarch.cli.slash import ALIASES, COMMANDS, obey
from mlxarch.cli.stats import stats_line
from mlxarch.errors import MlxArchError


@click.command("chat")
@click.argument("model", required=False)
@options.model_option
@options.answer_options
@options.thinking_options
@options.sampling_options
@options.loading_options
def chat_command(model: str | None, named: str | None, **given: Any) -> None:
    """Talk with a model.

    Enter sends, Alt-Enter begins a new line, Ctrl-C stops an answer, /help lists the commands. A model without a chat
    template continues the text. Through a pipe, every line is a question.
    """
    name = options.the_model(named, model)
    from mlxarch.backend import require_backend

    require_backend()
    sampling = options.chosen_sampling(given)
    loaded = options.open_model(name, **given)
    chosen = replace(loaded.recommended_sampling, **sampling)
    talk = Conversation(loaded, name, chosen, given["system"], given["max_tokens"])
    talk.stop, talk.think, talk.effort = list(given["stop"]), given["think"], given["effort"]
    talk.overflow = given["overflow"]
    source = editor(paths.state() / "history", [*COMMANDS, *ALIASES])
    stats = given["stats"] or is_terminal(sys.stderr)
    chat = Chat(talk, source, stats=stats, plain=given["plain"], hide_thinking=given["hide_thinking"])
    if not isinstance(source, Lines):
        kind = "" if loaded.tokenizer.has_chat_template else ", which has no chat template and continues your text"
        say(f"{name}{kind} · {loaded.context_length} tokens of context · /help lists the commands", dim=True)
    for warning in talk.switches().warnings:
        say(f"mlxarch: {name} {warning}")
    chat.run()


class Chat:
    """The loop: read, obey or ask, write.

    Attributes:
        stats: whether a line about the speed follows each answer.
        done: whether to end.
    """

    def __init__(
        self, conversation: Conversation, source: Editor, *, stats: bool, plain: bool, hide_thinking: bool
    ) -> None:
        self.conversation, self.source = conversation, source
        self.stats, self.plain, self.hide_thinking, self.done = stats, plain, hide_thinking, False

    def run(self) -> None:
        """Until the input ends, or a command ends it."""
        interrupted = False
        while not self.done:
            try:
                text = self.source.read()
            except EOFError:
                return
            except Interrupted as interrupt:
                if isinstance(self.source, Lines):
                    raise KeyboardInterrupt from None
                if interrupted and not interrupt.text:
                    return
                interrupted = True
                say("Ctrl-C again, Ctrl-D or /exit ends the chat", dim=True)
                continue
            interrupted = False
            if text:
                self._take(text)

    def _take(self, text: str) -> None:
        try:
            if text.startswith("/") and not text.startswith("//"):
                obey(self, text)
            else:
                question = text[1:] if text.startswith("//") else text
                self.answer(lambda *writers: self.conversation.ask(question, *writers))
        except MlxArchError as error:
            if isinstance(self.source, Lines):
                raise  # nobody is there to do something about it
            say(f"error: {error}")
        except KeyboardInterrupt as interrupt:
            if isinstance(self.source, Lines) or isinstance(interrupt, Terminated):
                raise
            say("stopped before the answer began; the question is not kept", dim=True)

    def answer(self, ask: Callable[[Writer, Writer], Answer]) -> None:
        """Let ``ask`` write an answer and the thinking before it, and say what is to be said of it."""
        answer = ask(writer(self.plain), thoughts(self.hide_thinking))
        notes = []
        if answer.finish_reason == STOPPED:
            notes.append("stopped; the answer is kept as far as it came")
        if note := left_out(answer.timings):
            notes.append(note)
        if answer.finish_reason == "length":
            full = self.conversation.max_tokens is None
            why = "the context is full, /clear or /undo makes room" if full else "max_tokens"
            notes.append(f"cut off{' within the thinking' if answer.thinking and not answer.text else ''}: {why}")
        if self.stats:
            notes.append(stats_line(answer.timings))
        if notes:
            say(" · ".join(notes), dim=True)
        if answer.finish_reason == STOPPED and isinstance(self.source, Lines):
            raise KeyboardInterrupt

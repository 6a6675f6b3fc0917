"""``mlxarch chat``: a conversation on the terminal or through a pipe."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import click

from mlxarch.cli import options
from mlxarch.cli.chat.conversation import Conversation
from mlxarch.cli.chat.line_editor import Editor, Interrupted, PipeReader, make_editor
from mlxarch.cli.chat.receive import LOOP_NOTE, STOPPED, Answer, dropped_tokens_note
from mlxarch.cli.chat.slash_commands import (
    ALIASES,
    COMMANDS,
    is_slash_command,
    run_slash_command,
)
from mlxarch.cli.output import is_terminal, print_stderr
from mlxarch.cli.render import Writer, make_answer_writer, make_thinking_writer
from mlxarch.cli.signals import Terminated
from mlxarch.cli.stats import timings_line
from mlxarch.errors import MlxArchError
from mlxarch.system import paths


@click.command("chat")
@click.argument("model", required=False)
@options.model_option
@options.answer_options
@options.thinking_options
@options.sampling_options
@options.loading_options
def chat_command(model: str | None, model_flag: str | None, **given: Any) -> None:
    """Chat with a model.

    Enter sends, Alt-Enter begins a new line, Ctrl-C stops an answer, /help lists the commands. A
    model without a chat template continues the text. Through a pipe, every line is a question.
    """
    name = options.resolve_model_name(model_flag, model)
    from mlxarch.system.backend import require_backend

    require_backend()
    sampling = options.given_sampling(given)
    loaded = options.load_model(name, **given)
    conversation = Conversation(
        loaded,
        name,
        replace(loaded.recommended_sampling, **sampling),
        given["system"],
        given["max_tokens"],
    )
    conversation.stop = list(given["stop"])
    conversation.think = given["think"]
    conversation.effort = given["effort"]
    conversation.overflow = given["overflow"]
    conversation.loop_guard = given["loop_guard"]
    editor = make_editor(paths.state() / "history", [*COMMANDS, *ALIASES])
    chat = Chat(
        conversation,
        editor,
        stats=given["stats"] or is_terminal(sys.stderr),
        plain=given["plain"],
        hide_thinking=given["hide_thinking"],
    )
    if not isinstance(editor, PipeReader):
        base_model = ", which has no chat template and continues your text"
        kind = "" if loaded.tokenizer.has_chat_template else base_model
        print_stderr(
            f"{name}{kind} · {loaded.context_length} tokens of context · /help lists the commands",
            dim=True,
        )
    for warning in conversation.thinking_switches().warnings:
        print_stderr(f"mlxarch: {name} {warning}")
    chat.run()


class Chat:
    """The loop of a chat: read an input, run a command or ask the model.

    Attributes:
        conversation: messages and settings.
        stats: whether a line of timings follows each answer.
        done: whether the chat is over.
    """

    def __init__(
        self,
        conversation: Conversation,
        editor: Editor,
        *,
        stats: bool,
        plain: bool,
        hide_thinking: bool,
    ) -> None:
        self.conversation = conversation
        self.stats = stats
        self.done = False
        self._editor = editor
        self._interactive = not isinstance(editor, PipeReader)
        self._plain = plain
        self._hide_thinking = hide_thinking

    def run(self) -> None:
        """Run until the input ends or a command ends the chat."""
        interrupted = False
        while not self.done:
            try:
                text = self._editor.read()
            except EOFError:
                return
            except Interrupted as interrupt:
                if not self._interactive:
                    raise KeyboardInterrupt from None
                if interrupted and not interrupt.text:
                    return
                interrupted = True
                print_stderr("Ctrl-C again, Ctrl-D or /exit ends the chat", dim=True)
                continue
            interrupted = False
            if text:
                self._handle_input(text)

    def _handle_input(self, text: str) -> None:
        """Run a command or ask a question; an error ends the chat only if it is not interactive."""
        try:
            if is_slash_command(text):
                run_slash_command(self, text)
            else:
                question = text[1:] if text.startswith("//") else text
                self.answer(lambda *writers: self.conversation.ask(question, *writers))
        except MlxArchError as error:
            if not self._interactive:
                raise
            print_stderr(f"error: {error}")
        except KeyboardInterrupt as interrupt:
            if not self._interactive or isinstance(interrupt, Terminated):
                raise
            print_stderr("stopped before the answer began; the question is not kept", dim=True)

    def answer(self, ask: Callable[[Writer, Writer], Answer]) -> None:
        """Write the answer that ``ask`` gets, given writers of answer and thinking, then notes."""
        answer = ask(make_answer_writer(self._plain), make_thinking_writer(self._hide_thinking))
        notes = []
        if answer.finish_reason == STOPPED:
            notes.append("stopped; the answer is kept as far as it came")
        if note := dropped_tokens_note(answer.timings):
            notes.append(note)
        if answer.finish_reason == "loop":
            notes.append(LOOP_NOTE)
        if answer.finish_reason == "length":
            full = self.conversation.max_tokens is None
            reason = "the context is full, /clear or /undo makes room" if full else "max_tokens"
            part = " within the thinking" if answer.thinking and not answer.text else ""
            notes.append(f"cut off{part}: {reason}")
        if self.stats:
            notes.append(timings_line(answer.timings))
        if notes:
            print_stderr(" · ".join(notes), dim=True)
        if answer.finish_reason == STOPPED and not self._interactive:
            raise KeyboardInterrupt

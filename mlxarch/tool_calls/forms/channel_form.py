"""Calls as messages on a channel, addressed to a function: gpt-oss (harmony)."""

from collections.abc import Mapping, Sequence

from mlxarch.tool_calls.events import CallWriter
from mlxarch.tool_calls.form import FREE_TEXT, CallForm, CallGrammar, CallRules, ToolRule
from mlxarch.tool_calls.scanner import Scanner, Steps, quoted
from mlxarch.tool_calls.tool import Tool

_HEADER = 8  # tokens of a prompt that may hold the beginning of a header


class ChannelCalls(CallForm):
    """Messages ``<|channel|>commentary to=functions.name <|constrain|>json<|message|>{…}``.

    The splitter of channels reads them, since a message's header says both its channel and its
    recipient; this class has the grammar.
    """

    name = "messages to functions"
    mark_texts = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>")
    parallel = False

    @property
    def openings(self) -> tuple[tuple[str, str], ...]:
        """Implement ``CallForm``."""
        return ()

    def read(self, scan: Scanner, calls: CallWriter, tools: Mapping[str, Tool]) -> Steps[None]:
        """Implement ``CallForm``."""
        raise NotImplementedError
        yield

    def has_headers(self, prompt: Sequence[int]) -> bool:
        """Implement ``CallForm``: the prompt ends within a header."""
        tail = list(prompt[-_HEADER:])
        start, _, message, *_ = (self.marks[text].token for text in self.mark_texts)
        return start in tail and message not in tail[tail.index(start) :]

    def rules(self, tools: Sequence[ToolRule]) -> CallRules:
        """Implement ``CallForm``: headers with the recipient behind the role or the channel."""
        _, channel, message, _, constrain = (self.marks[text].lark for text in self.mark_texts)
        calls: list[str] = []
        for index, tool in enumerate(tools):
            to = f" to=functions.{tool.name}"
            calls.append(
                f'call_{index}: ({quoted(to)} {channel} "commentary json" '
                f'| {channel} "commentary" {quoted(f"{to} ")} {constrain} "json") {message} '
                f"args_{index}\n"
                f"args_{index}: {tool.rule}"
            )
        return CallRules("", '""', calls, '""', '""')

    def grammar(
        self, tools: Sequence[ToolRule], *, required: bool, parallel: bool, answer: str | None
    ) -> CallGrammar:
        """Implement ``CallForm``: thinking and remarks first, then an answer or a call."""
        start, channel, message, end, _ = (self.marks[text].lark for text in self.mark_texts)
        last = ["call"] if tools else []
        rules = list(self.rules(tools).calls) if tools else []
        if tools:
            rules.append(f"call: {' | '.join(f'call_{index}' for index in range(len(tools)))}")
        if not required:
            last.append("final")
            rules.append(f'final: {channel} "final" {message} answer')
            rules.append(f"answer: {answer or 'TEXT'}")
        return CallGrammar(
            f"start: before* ({' | '.join(last)})\n"
            f"before: {channel} /analysis|commentary/ {message} TEXT {end} {start} "
            '"assistant"\n' + "\n".join([*rules, f"TEXT: {FREE_TEXT}"])
        )

"""Whole answers, collected from their events."""

from contextlib import aclosing
from dataclasses import dataclass, field

from mlxarch.engine.request import PromptReport
from mlxarch.generation.logprobs import TokenLogprobs
from mlxarch.server.answers.answers import Answers
from mlxarch.server.answers.events import Delta, End, Event, PromptRead
from mlxarch.tool_calls.events import CallArguments, CallFailed, CallStarted


@dataclass
class Call:
    """Call of a tool.

    Attributes:
        id: identifier, which the tool's result refers to.
        name: name of the tool.
        arguments: arguments as JSON text, as the model wrote them.
    """

    id: str
    name: str
    arguments: str = ""

    @property
    def text(self) -> str:
        """Arguments as JSON text, an empty object for none."""
        return self.arguments or "{}"


@dataclass
class Collected:
    """One whole answer.

    Attributes:
        text: the answer.
        thinking: the model's thinking before it.
        logprobs: log-probabilities of the answer's tokens.
        calls: complete calls of tools.
        prompt: report about the prompt.
        end: last event.
    """

    text: str = ""
    thinking: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    calls: list["Call"] = field(default_factory=list)
    prompt: PromptReport | None = None
    end: End = field(default_factory=lambda: End("stop"))

    def add(self, event: Event) -> None:
        """Add an event."""
        if isinstance(event, PromptRead):
            self.prompt = event.report
        elif isinstance(event, End):
            self.end = event
        elif isinstance(event, Delta) and event.thinking:
            self.thinking += event.text
        elif isinstance(event, Delta):
            self.text += event.text
            self.logprobs += event.logprobs
        elif isinstance(event, CallStarted):
            self.calls.append(Call(event.id, event.name))
        elif isinstance(event, CallArguments):
            self.calls[-1].arguments += event.text
        elif isinstance(event, CallFailed):
            self.calls.pop()
            self.text += event.text


async def collect(answers: Answers) -> list[Collected]:
    """Wait for all answers.

    Raises:
        MlxArchError: the model failed.
    """
    collected = [Collected() for _ in range(answers.count)]
    async with aclosing(answers.events()) as events:
        async for index, event in events:
            collected[index].add(event)
    for answer, reader in zip(collected, answers.readers, strict=True):
        answer.thinking, answer.text = reader.whole(answer.thinking, answer.text)
    return collected

"""Whole answers, collected from their events."""

from contextlib import aclosing
from dataclasses import dataclass, field

from mlxarch.engine.request import PromptReport, TokenLogprobs
from mlxarch.server.answers.answers import Answers
from mlxarch.server.answers.events import Delta, End, Event, PromptRead


@dataclass
class Collected:
    """One whole answer.

    Attributes:
        text: the answer.
        thinking: the model's thinking before it.
        logprobs: log-probabilities of the answer's tokens.
        prompt: report about the prompt.
        end: last event.
    """

    text: str = ""
    thinking: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
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


async def collect(answers: Answers) -> list[Collected]:
    """Wait for all answers.

    Raises:
        MlxArchError: the model failed.
    """
    collected = [Collected() for _ in range(answers.count)]
    async with aclosing(answers.events()) as events:
        async for index, event in events:
            collected[index].add(event)
    return collected

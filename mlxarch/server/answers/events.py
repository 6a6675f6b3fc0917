"""Events of an answer while it is generated, and its usage figures."""

from dataclasses import dataclass, field

from mlxarch.engine.request import PromptReport, RequestTimings
from mlxarch.generation.logprobs import TokenLogprobs
from mlxarch.tool_calls.events import CallEvent


@dataclass(frozen=True)
class Waiting:
    """Sign of life while there is nothing to tell: the prompt is read, or the request is queued."""


@dataclass(frozen=True)
class PromptRead:
    """The prompt of an answer has been read."""

    report: PromptReport


@dataclass(frozen=True)
class Delta:
    """Text that continues an answer or its thinking.

    Attributes:
        text: the text; empty only if there are log-probabilities.
        thinking: whether the text belongs to the model's thinking.
        logprobs: log-probabilities of the tokens of an answer's text.
    """

    text: str
    thinking: bool = False
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass
class Usage:
    """Token counts of one answer, or of several to one prompt."""

    prompt: int = 0
    cached: int = 0
    answer: int = 0
    thinking: int = 0


@dataclass(frozen=True)
class End:
    """End of an answer.

    Attributes:
        reason: "stop" or "length", or "tool_calls" where the model called tools.
        stop_sequence: stop string that ended the answer.
        usage: token counts.
        timings: seconds by phase; None if a stop string ended the answer.
    """

    reason: str
    stop_sequence: str | None = None
    usage: Usage = field(default_factory=Usage)
    timings: RequestTimings | None = None


Event = Waiting | PromptRead | Delta | End | CallEvent

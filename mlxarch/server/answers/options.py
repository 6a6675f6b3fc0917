"""Options of an answer, in the same form for all APIs."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mlxarch.generation.sampling import Sampling
from mlxarch.server.answers.constraint import AnswerSchema
from mlxarch.server.answers.tools import ToolOptions
from mlxarch.server.http.errors import invalid

MAX_STOPS = 16
_MAX_STOP_LENGTH = 1000


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of an answer.

    Attributes:
        max_tokens: limit of the answer; None allows all that fits into the context.
        min_tokens: tokens before which no end token may come; None forbids all end tokens.
        clamp: shorten ``max_tokens`` to what fits instead of refusing.
        stop: stop strings.
        sampling: fields of ``Sampling`` that the request names; others are the model's own.
        top_logprobs: number of most likely tokens to report; None reports no log-probabilities.
        prompt_logprobs: whether log-probabilities of the prompt are reported.
        count: answers to each prompt.
        think: whether to think; None leaves it to the model.
        effort: level of reasoning effort; None leaves it to the model.
        thinking_budget: tokens that the model may think; None for no limit.
        variables: further variables of the chat template.
        form: form of the answers; None for free text.
        tools: tools that the model may call.
        conversation: name of the conversation, a hint for the prefix cache.
        continues: whether an answer continues the text of its prompt.
        inline_thinking: whether the thinking is part of the text, between tags.
        prompt_param: field of the request that the prompt comes from, for errors.
    """

    max_tokens: int | None = None
    min_tokens: int | None = 0
    clamp: bool = False
    stop: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    count: int = 1
    think: bool | None = None
    effort: str | None = None
    thinking_budget: int | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    form: AnswerSchema | None = None
    tools: ToolOptions = field(default_factory=ToolOptions)
    conversation: str | None = None
    continues: bool = False
    inline_thinking: bool = False
    prompt_param: str = "messages"


def stop_strings(stop: str | list[str] | None, param: str = "stop") -> tuple[str, ...]:
    """Check the stop strings of a request."""
    if stop is None:
        return ()
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS:
        raise invalid(
            f"{param} has {len(stops)} strings; at most {MAX_STOPS} are looked for", param
        )
    for text in stops:
        if not 1 <= len(text) <= _MAX_STOP_LENGTH:
            raise invalid(
                f"{param} holds a string of {len(text)} characters; from 1 to {_MAX_STOP_LENGTH} "
                "are allowed",
                param,
            )
    return stops


def logit_bias(bias: Mapping[str, float] | None, vocab_size: int) -> dict[int, float]:
    """Convert the keys of ``logit_bias`` to token ids and check them."""
    result: dict[int, float] = {}
    for key, value in (bias or {}).items():
        if not key.isascii() or not key.isdigit() or len(key) > 9 or int(key) >= vocab_size:
            raise invalid(
                f"logit_bias names token {key[:20]!r}; ids run from 0 to {vocab_size - 1}",
                "logit_bias",
            )
        if not -100 <= value <= 100:
            raise invalid(f"logit_bias of {key} is {value}; allowed are -100 to 100", "logit_bias")
        result[int(key)] = value
    return result


def sampling_for(options: Options, recommended: Sampling, index: int) -> Sampling:
    """Sampling of one of several answers: with a seed, each has the next one."""
    given = {name: value for name, value in options.sampling.items() if value is not None}
    if given.get("seed") is not None:
        given["seed"] = (given["seed"] + index) % 2**64
    return replace(recommended, **given)

"""Types of fields that several APIs share."""

import re
from typing import Annotated, Any

import msgspec

from mlxarch.server.http.errors import invalid

Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Temperature = Annotated[float, msgspec.Meta(ge=0, le=100)]
OpenAITemperature = Annotated[float, msgspec.Meta(ge=0, le=2)]
AnthropicTemperature = Annotated[float, msgspec.Meta(ge=0, le=1)]
Probability = Annotated[float, msgspec.Meta(ge=0, le=1)]
Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
Seed = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
TopK = Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)]
RepetitionPenalty = Annotated[float, msgspec.Meta(gt=0, le=100)]
TopLogprobs = Annotated[int, msgspec.Meta(ge=0, le=20)]
AnswerCount = Annotated[int, msgspec.Meta(ge=1, le=16)]
JsonObject = dict[str, Any]
KeepAlive = str | int | float | None
_DURATION = re.compile(r"(-?\d+(?:\.\d+)?)(ms|s|m|h|)")
_UNITS = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}


def positive(probability: float | None) -> float | None:
    """Probability above 0: at 0 the most likely token alone is left, as at the least number."""
    return None if probability is None else max(probability, 1e-9)


class Strict(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Object of a request whose unknown fields are refused."""


class LogitSampling(Strict):
    """Sampling fields that OpenAI's endpoints and local clients share."""

    temperature: OpenAITemperature | None = None
    top_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Seed | None = None
    logit_bias: dict[str, float] | None = None
    top_k: TopK | None = None
    min_p: Probability | None = None
    repetition_penalty: RepetitionPenalty | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None = None

    @property
    def shortest(self) -> int | None:
        """Tokens before which no end token is chosen; None forbids end tokens altogether."""
        return None if self.ignore_eos else self.min_tokens or 0

    def sampling(self) -> dict[str, Any]:
        """Fields of ``Sampling`` that the request names, without the logit bias."""
        return {
            "temperature": self.temperature,
            "top_p": positive(self.top_p),
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "seed": self.seed,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
        }


def keep_seconds(value: KeepAlive, default: float) -> float:
    """Seconds of a duration such as "5m", 300 or -1.

    Raises:
        ApiError: it is no duration.
    """
    if value is None:
        return default
    if isinstance(value, int | float):
        return float(value)
    parts = _DURATION.findall(value)
    if not parts or "".join(number + unit for number, unit in parts) != value.strip():
        raise invalid("keep_alive is a duration such as 5m, 300 or -1", "keep_alive")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)

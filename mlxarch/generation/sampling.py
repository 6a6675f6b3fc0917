"""Sampling: choice of the next token from logits."""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import mlx.core as mx

from mlxarch.errors import InvalidInput

# Every draw is greedy long before, and logits divided by much less overflow float32
LEAST_TEMPERATURE = 1e-30


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling parameters, applied in this order.

    Attributes:
        logit_bias: number added to the logit of each token id.
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt
            or the answer (arXiv:1909.05858); 1 changes nothing.
        frequency_penalty: subtracted from the logit of a token for each time that the answer
            already has it.
        presence_penalty: subtracted once from the logit of each token that the answer already has.
        temperature: divisor of the logits; at 0 the most likely token is taken and nothing below
            applies.
        top_k: number of most likely tokens to keep; 0 keeps all.
        top_p: probability that the most likely tokens kept together reach (arXiv:1904.09751); 1
            keeps all.
        min_p: probability of a token to keep, relative to the most likely one (arXiv:2407.01082).
        seed: the same seed gives the same tokens on the same machine, alone or in a batch; None
            draws a new random stream for each prompt.

    Raises:
        InvalidInput: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _in_range("temperature", self.temperature, 0, 100)
        _in_range("top_k", self.top_k, 0, 2**31 - 1, whole=True)
        _in_range("top_p", self.top_p, 0, 1, above=True)
        _in_range("min_p", self.min_p, 0, 1)
        _in_range("repetition_penalty", self.repetition_penalty, 0, 100, above=True)
        _in_range("frequency_penalty", self.frequency_penalty, -100, 100)
        _in_range("presence_penalty", self.presence_penalty, -100, 100)
        if self.seed is not None:
            _in_range("seed", self.seed, 0, 2**64 - 1, whole=True)
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidInput(
                f"logit_bias must map token ids to numbers, found {self.logit_bias!r}"
            )
        for token, bias in self.logit_bias.items():
            _in_range("token id in logit_bias", token, 0, 2**31 - 1, whole=True)
            _in_range(f"logit_bias of token {token}", bias, -1000, 1000)


class SamplingArguments(TypedDict, total=False):
    """Fields of ``Sampling`` as arguments of a function, for type checkers."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    seed: int | None
    logit_bias: Mapping[int, float]


def _in_range(
    name: str, value: float, low: float, high: float, *, above: bool = False, whole: bool = False
) -> None:
    kind = int if whole else (int, float)
    sound = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
    if not sound or not low <= value <= high or (above and value == low):
        what = "a whole number" if whole else "a number"
        raise InvalidInput(
            f"{name} must be {what} {'above' if above else 'from'} {low} to {high}, found {value!r}"
        )


class RowSampler:
    """State of the sampling of one answer: its random stream and the tokens that it has.

    Nothing in it depends on the other rows of a batch. It builds graphs and reads nothing back.

    Args:
        sampling: sampling parameters.
        vocab_size: V, the number of logits.
        prompt: token ids of the prompt, for the repetition penalty.

    Raises:
        InvalidInput: ``logit_bias`` names a token outside of the vocabulary.
    """

    def __init__(self, sampling: Sampling, vocab_size: int, prompt: Sequence[int]) -> None:
        self.settings = sampling
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        self._key = mx.random.key(seed)
        self._bias: mx.array | None = None
        self._seen: mx.array | None = None  # tokens of prompt and answer
        self._counts: mx.array | None = None  # of each token in the answer
        if sampling.logit_bias:
            ids = list(sampling.logit_bias)
            if max(ids) >= vocab_size:
                raise InvalidInput(
                    f"logit_bias names token {max(ids)}; the vocabulary ends at {vocab_size - 1}"
                )
            biases = mx.array(list(sampling.logit_bias.values()))
            self._bias = mx.zeros((vocab_size,)).at[mx.array(ids)].add(biases)
        if sampling.repetition_penalty != 1:
            self._seen = mx.zeros((vocab_size,), mx.bool_)
            if prompt:
                self._seen[mx.array(list(prompt))] = True
        if sampling.frequency_penalty or sampling.presence_penalty:
            self._counts = mx.zeros((vocab_size,))

    @property
    def state(self) -> list[mx.array]:
        """Arrays that the next choice depends on."""
        return [a for a in (self._key, self._seen, self._counts) if a is not None]

    @property
    def adjusts_logits(self) -> bool:
        """Whether ``adjust`` changes anything."""
        return self._bias is not None or self._seen is not None or self._counts is not None

    @property
    def method(self) -> tuple[float, ...]:
        """Parameters of the draw; rows that share them draw together. Empty for greedy ones."""
        s = self.settings
        if s.temperature < LEAST_TEMPERATURE:
            return ()
        return (s.temperature, s.top_k, s.top_p, s.min_p)

    def adjust(self, logits: mx.array) -> mx.array:
        """Add the bias to logits (V,) and apply the penalties."""
        settings = self.settings
        logits = logits.astype(mx.float32)
        if self._bias is not None:
            logits = logits + self._bias
        if self._seen is not None:
            penalty = settings.repetition_penalty
            penalized = mx.where(logits > 0, logits / penalty, logits * penalty)
            logits = mx.where(self._seen, penalized, logits)
        if self._counts is not None:
            logits = logits - settings.frequency_penalty * self._counts
            logits = logits - settings.presence_penalty * (self._counts > 0)
        return logits

    def record(self, token: mx.array) -> None:
        """Count a token () as part of the answer."""
        if self._seen is not None:
            self._seen = mx.put_along_axis(self._seen, token[None], mx.array(True), axis=-1)
        if self._counts is not None:
            self._counts = self._counts.at[token].add(1)

    def draw_noise(self, count: int) -> mx.array:
        """Draw Gumbel noise (count,), and advance the random stream."""
        self._key, own = mx.random.split(self._key)
        return mx.random.gumbel((count,), key=own)


def sample(
    rows: Sequence[RowSampler],
    logits: mx.array,
    masks: Sequence[mx.array | None] | None = None,
) -> mx.array:
    """Choose the next token of each row, each by its own parameters.

    Args:
        masks: for each row the tokens (V,) that it may take; None allows all.

    Shape:
        logits (B, V) -> tokens (B,)
    """
    masks = masks or [None] * len(rows)
    adjusted = [
        row.adjusts_logits or mask is not None for row, mask in zip(rows, masks, strict=True)
    ]
    if any(adjusted):
        by_row = [part[0] for part in mx.split(logits, len(rows))]
        for index, (row, mask) in enumerate(zip(rows, masks, strict=True)):
            own = row.adjust(by_row[index]) if row.adjusts_logits else by_row[index]
            by_row[index] = own if mask is None else mx.where(mask, own, -mx.inf)
        logits = mx.stack([own.astype(mx.float32) for own in by_row])
    groups: dict[tuple[float, ...], list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.method, []).append(index)
    if len(groups) == 1:
        tokens = _choose(rows, logits)
    else:
        order = [index for group in groups.values() for index in group]
        chosen = [
            _choose([rows[index] for index in group], logits[mx.array(group)])
            for group in groups.values()
        ]
        tokens = mx.concatenate(chosen)[mx.array([order.index(i) for i in range(len(rows))])]
    for index, row in enumerate(rows):
        if row.adjusts_logits:
            row.record(tokens[index])
    return tokens


def _choose(rows: Sequence[RowSampler], logits: mx.array) -> mx.array:
    """Choose tokens (B,) from logits (B, V) of rows with the same parameters of the draw."""
    settings = rows[0].settings
    if not rows[0].method:
        return mx.argmax(logits, axis=-1)
    logits = logits.astype(mx.float32) / settings.temperature
    ids = None  # token ids of the logits that are left; None for all in order
    if 0 < settings.top_k < logits.shape[-1]:
        ids = mx.argpartition(-logits, settings.top_k - 1, axis=-1)[:, : settings.top_k]
        logits = mx.take_along_axis(logits, ids, axis=-1)
    if settings.top_p < 1:
        order = mx.argsort(-logits, axis=-1)
        ids = order if ids is None else mx.take_along_axis(ids, order, axis=-1)
        logits = mx.take_along_axis(logits, order, axis=-1)
        probabilities = mx.softmax(logits, axis=-1)
        # Sum over more likely tokens: 0 for the first, which is therefore always kept
        more_likely = mx.cumsum(probabilities, axis=-1) - probabilities
        logits = mx.where(more_likely < settings.top_p, logits, -mx.inf)
    if settings.min_p > 0:
        floor = logits.max(axis=-1, keepdims=True) + math.log(settings.min_p)
        logits = mx.where(logits >= floor, logits, -mx.inf)
    # The argmax of logits plus Gumbel noise is a sample of their softmax. Each row draws noise of
    # its own, so that its tokens do not depend on the other rows.
    noise = mx.stack([row.draw_noise(logits.shape[-1]) for row in rows])
    chosen = mx.argmax(logits + noise, axis=-1)
    return chosen if ids is None else mx.take_along_axis(ids, chosen[:, None], axis=-1)[:, 0]


class Sampler:
    """Sampler for the rows of a batch that share their parameters.

    Each row has its own random stream. With a seed all rows start from it, so that the answer to a
    prompt is the same alone and in a batch.

    Args:
        sampling: sampling parameters.
        vocab_size: number of logits.
        prompts: token ids of each row, for the repetition penalty.

    Raises:
        InvalidInput: ``logit_bias`` names a token outside of the vocabulary.
    """

    def __init__(
        self, sampling: Sampling, vocab_size: int, prompts: Sequence[Sequence[int]]
    ) -> None:
        self.rows = [RowSampler(sampling, vocab_size, prompt) for prompt in prompts]

    @property
    def state(self) -> list[mx.array]:
        """Arrays that the next call depends on."""
        return [array for row in self.rows for array in row.state]

    def __call__(self, logits: mx.array) -> mx.array:
        """Logits (B, V) -> tokens (B,)."""
        return sample(self.rows, logits)

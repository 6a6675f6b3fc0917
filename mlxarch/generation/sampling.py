"""Sampling: choice of the next token from logits."""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlxarch.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling parameters, applied in this order.

    Attributes:
        logit_bias: number added to the logit of each token id.
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt
            or the answer (arXiv:1909.05858); 1 changes nothing.
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
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _in_range("temperature", self.temperature, 0, 100)
        _in_range("top_k", self.top_k, 0, 2**31 - 1, whole=True)
        _in_range("top_p", self.top_p, 0, 1, above=True)
        _in_range("min_p", self.min_p, 0, 1)
        _in_range("repetition_penalty", self.repetition_penalty, 0, 100, above=True)
        if self.seed is not None:
            _in_range("seed", self.seed, 0, 2**64 - 1, whole=True)
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidInput(
                f"logit_bias must map token ids to numbers, found {self.logit_bias!r}"
            )
        for token, bias in self.logit_bias.items():
            _in_range("token id in logit_bias", token, 0, 2**31 - 1, whole=True)
            _in_range(f"logit_bias of token {token}", bias, -1000, 1000)


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


class Sampler:
    """Sampler for the rows of a batch; it builds a graph and reads nothing back to the host.

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
        self.settings = sampling
        self._keys = [
            mx.random.key(secrets.randbits(64) if sampling.seed is None else sampling.seed)
            for _ in prompts
        ]
        self._bias: mx.array | None = None
        self._seen: mx.array | None = None
        if sampling.logit_bias:
            ids = list(sampling.logit_bias)
            if max(ids) >= vocab_size:
                raise InvalidInput(
                    f"logit_bias names token {max(ids)}; the vocabulary ends at {vocab_size - 1}"
                )
            self._bias = (
                mx.zeros((vocab_size,))
                .at[mx.array(ids)]
                .add(mx.array(list(sampling.logit_bias.values())))
            )
        if sampling.repetition_penalty != 1:
            self._seen = mx.zeros((len(prompts), vocab_size), mx.bool_)
            for row, prompt in enumerate(prompts):
                if prompt:
                    self._seen[row, mx.array(list(prompt))] = True

    @property
    def state(self) -> list[mx.array]:
        """Arrays that the next call depends on: random keys and seen tokens."""
        return self._keys if self._seen is None else [*self._keys, self._seen]

    def __call__(self, logits: mx.array) -> mx.array:
        """Logits (B, V) -> tokens (B,)."""
        settings = self.settings
        if settings.temperature == 0 and self._bias is None and self._seen is None:
            return mx.argmax(logits, axis=-1)
        logits = logits.astype(mx.float32)
        if self._bias is not None:
            logits = logits + self._bias
        if self._seen is not None:
            penalty = settings.repetition_penalty
            logits = mx.where(
                self._seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits
            )
        if settings.temperature == 0:
            tokens = mx.argmax(logits, axis=-1)
        else:
            tokens = self._draw(logits / settings.temperature)
        if self._seen is not None:
            self._seen = mx.put_along_axis(self._seen, tokens[:, None], mx.array(True), axis=-1)
        return tokens

    def _draw(self, logits: mx.array) -> mx.array:
        """Draw tokens (B,) from logits (B, V) that are divided by the temperature."""
        settings = self.settings
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
        # The argmax of logits plus Gumbel noise is a sample of their softmax. Noise is drawn row by
        # row, so that a row's tokens do not depend on the other rows.
        noise = []
        for row, key in enumerate(self._keys):
            self._keys[row], own = mx.random.split(key)
            noise.append(mx.random.gumbel(logits.shape[-1:], key=own))
        chosen = mx.argmax(logits + mx.stack(noise), axis=-1)
        return chosen if ids is None else mx.take_along_axis(ids, chosen[:, None], axis=-1)[:, 0]

"""Timings of a generation: seconds and tokens of prefill and decoding."""

from dataclasses import dataclass


@dataclass
class Timings:
    """Duration of a generation in seconds, and its token counts.

    Attributes:
        prompt_tokens: tokens of the whole prompt.
        reused_tokens: prompt tokens that the KV cache held already from an earlier turn.
        generated_tokens: sampled tokens, the end token included.
        prefill_seconds: time to the first token.
        decode_seconds: time from the first to the last token.
        dropped_tokens: tokens of prompt and answer removed by a context shift.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    dropped_tokens: int = 0

    def record(self, index: int, seconds: float, rows: int = 1) -> None:
        """Record token ``index`` of each of ``rows`` answers, ``seconds`` after the start."""
        if index == 0:
            self.prefill_seconds = seconds
        self.generated_tokens = (index + 1) * rows
        self.decode_seconds = seconds - self.prefill_seconds

    @property
    def time_to_first_token(self) -> float:
        """Seconds from the start to the first token."""
        return self.prefill_seconds

    @property
    def prefill_rate(self) -> float:
        """Processed prompt tokens per second, reused ones not counted."""
        if not self.prefill_seconds:
            return 0.0
        return (self.prompt_tokens - self.reused_tokens) / self.prefill_seconds

    @property
    def decode_rate(self) -> float:
        """Generated tokens per second after the first."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0

"""Calibration data: the tokens whose activations and gradients guide quantization."""

import hashlib
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxarch.checkpoint.source import CheckpointSource
from mlxarch.errors import TokenizerError
from mlxarch.loading.resolve import Resolved
from mlxarch.progress import Progress, silent
from mlxarch.quantize.calibration.input_stats import random_tokens, text_windows
from mlxarch.quantize.calibration.self_generated import PASSAGE_LENGTH, generate_continuations
from mlxarch.quantize.calibration.texts import read_texts
from mlxarch.tokenizer.tokenizer import Tokenizer

BUNDLED_TEXT = Path(__file__).with_name("texts") / "calibration.txt"  # not used for evaluation
MIN_TOKENS = 1024
MAX_TOKENS = 8192
MAX_CHARACTERS = 16 * MAX_TOKENS  # characters of a text that are tokenized
# Self-generated tokens: 10 for each input channel of the widest matrix, within two limits
TOKENS_PER_CHANNEL = 10
MAX_PARAMETER_TOKENS = 1 << 37  # parameters times tokens, which takes seconds
MAX_ACTIVATION_BYTES = 16 << 20  # inputs of the widest matrix
METHOD_BUDGET = {"search": 1, "gptq": 2}  # factor of tokens, activations and asymmetric tokens


class CalibrationTokens(NamedTuple):
    """Token ids for calibration, in batches (B, L).

    Attributes:
        inputs: tokens from which input statistics and gradients are collected.
        asymmetric: other tokens, on which matrices are corrected for the error of earlier layers;
            see ``methods.asymmetric_calibration``.
    """

    inputs: list[mx.array]
    asymmetric: list[mx.array]


@dataclass(frozen=True)
class Calibration:
    """Calibration tokens before self-generation, and a description of where they come from.

    Attributes:
        batches: token ids (B, L) for input statistics and gradients.
        description: source of the tokens in words, for the model card.
        generated_batches: how many of the last of ``batches`` the model continues itself: of these,
            only the first token of each passage is kept.
        asymmetric_batches: token ids for asymmetric calibration, all continued by the model.
    """

    batches: tuple[mx.array, ...]
    description: str
    generated_batches: int = 0
    asymmetric_batches: tuple[mx.array, ...] = ()

    @classmethod
    def default(cls, method: str, source: CheckpointSource, resolved: Resolved) -> "Calibration":
        """Return the calibration used when no text is given: self-generated tokens.

        gptq adds the bundled text, because a model may not generate every language that it reads.
        Without a tokenizer the text is left out.
        """
        if method == "gptq":
            with suppress(TokenizerError):
                text = cls.from_text(BUNDLED_TEXT, source, resolved)
                length = text.batches[0].shape[1]
                random = [np.asarray(batch).ravel() for batch in _random_batches(resolved, method)]
                ids = np.concatenate(random)
                generated = mx.array(ids[: ids.size // length * length].reshape(-1, length))
                return replace(
                    text,
                    batches=(*text.batches, generated),
                    generated_batches=1,
                    description=f"{text.token_count:,} tokens of the text that comes with mlxarch, "
                    + _describe_generated(generated.size),
                )
        batches = tuple(_random_batches(resolved, method))
        count = sum(batch.size for batch in batches)
        return cls(batches, _describe_generated(count), len(batches))

    @classmethod
    def from_text(
        cls, file: str | Path, source: CheckpointSource, resolved: Resolved
    ) -> "Calibration":
        """Tokenize the beginning of a text file with the source's tokenizer.

        Raises:
            InvalidInput: the file cannot be read, or is no text.
            TokenizerError: the source has no tokenizer, or that of another model.
        """
        [text] = read_texts([file])
        ids = load_tokenizer(source).encode(text.content[:MAX_CHARACTERS])[:MAX_TOKENS]
        vocab_size = resolved.model.vocab_size
        if max(ids, default=0) >= vocab_size:
            raise TokenizerError(
                f"the tokenizer makes token {max(ids)} of a text, and the model has {vocab_size}"
            )
        batches = tuple(text_windows(ids, resolved.model.context_length))
        count = sum(batch.size for batch in batches)
        return cls(batches, f"{count:,} tokens of {Path(file).name}")

    def with_asymmetric_tokens(self, method: str, resolved: Resolved) -> "Calibration":
        """Return a copy with tokens for asymmetric calibration, by the budget of the method."""
        batches = _random_batches(resolved, method, METHOD_BUDGET.get(method, 1), seed=1)
        return replace(self, asymmetric_batches=tuple(batches))

    def generate_tokens(
        self, resolved: Resolved, progress: Progress = silent, asymmetric: bool = True
    ) -> CalibrationTokens:
        """Let the model continue its passages; return all tokens.

        Args:
            resolved: the model.
            progress: receives the number of token positions generated.
            asymmetric: False leaves out the tokens for asymmetric calibration.
        """
        fixed = list(self.batches[: len(self.batches) - self.generated_batches])
        prompts = list(self.batches[len(fixed) :])
        if asymmetric:
            prompts += self.asymmetric_batches
        generated = generate_continuations(resolved, prompts, progress=progress)
        return CalibrationTokens(
            fixed + generated[: self.generated_batches], generated[self.generated_batches :]
        )

    @property
    def token_count(self) -> int:
        """Number of tokens in ``batches``."""
        return sum(batch.size for batch in self.batches)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all token ids and the number of generated batches, as hexadecimal digits."""
        batches = [batch.tolist() for batch in (*self.batches, *self.asymmetric_batches)]
        return hashlib.sha256(repr([self.generated_batches, *batches]).encode()).hexdigest()


def generated_token_count(resolved: Resolved, method: str) -> int:
    """Return how many calibration tokens the model generates.

    ``TOKENS_PER_CHANNEL`` for each input channel of the widest matrix, limited by computing time
    (``MAX_PARAMETER_TOKENS``) and by memory (``MAX_ACTIVATION_BYTES``), times the method's budget.
    """
    shapes = [resolved.tensors[path].shape for path in resolved.matrices]
    elements = sum(map(prod, shapes))
    widest = max((shape[-1] for shape in shapes), default=1)
    budget = METHOD_BUDGET.get(method, 1)
    count = min(
        MAX_PARAMETER_TOKENS // max(elements, 1),
        TOKENS_PER_CHANNEL * widest,
        budget * MAX_ACTIVATION_BYTES // (4 * widest),
        MAX_TOKENS,
    )
    return max(budget * count, MIN_TOKENS)


def _random_batches(
    resolved: Resolved, method: str, factor: int = 1, seed: int = 0
) -> list[mx.array]:
    count = factor * generated_token_count(resolved, method)
    return random_tokens(resolved.model.vocab_size, resolved.model.context_length, count, seed)


def _describe_generated(count: int) -> str:
    return f"{count:,} tokens that the model wrote itself, in passages of {PASSAGE_LENGTH}"


def load_tokenizer(source: CheckpointSource) -> Tokenizer:
    """Load the tokenizer of a checkpoint.

    Raises:
        TokenizerError: the checkpoint has none, or it is invalid.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, contents in source.sidecars.items():
            if isinstance(contents, Path):
                shutil.copyfile(contents, Path(folder) / name)
            else:
                (Path(folder) / name).write_bytes(contents)
        try:
            return Tokenizer.from_folder(Path(folder))
        except TokenizerError as error:
            # the temporary folder means nothing to the user
            raise TokenizerError(str(error).replace(folder, "the source")) from None

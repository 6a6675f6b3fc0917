"""The tokens whose way through a model tells which of its channels matter."""

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

from mlxarch.errors import TokenizerError
from mlxarch.progress import Progress, silent
from mlxarch.quantize.continuation import PASSAGE, continued
from mlxarch.quantize.corpus import read_texts
from mlxarch.quantize.importance import random_tokens, text_tokens
from mlxarch.tokenizer import Tokenizer
from mlxarch.weights import Resolved, Source

BUNDLED = Path(__file__).with_name("texts") / "calibration.txt"  # no evaluation reads it
LEAST, MOST = 1024, 8192  # tokens
BYTES = 16 * MOST  # of a text that are looked at for them
PER_CHANNEL = 10  # tokens that a model writes for each channel of its widest matrix, unless that is
WORK = 1 << 37  # more than so many parameters times tokens, which take seconds, or
ACTIVATIONS = 16 << 20  # more than so many bytes in front of that matrix
PATIENCE = {"search": 1, "gptq": 2}  # times the work, the activations, and then the trail


class Tokens(NamedTuple):
    """Batches (B, L) of what the matrices are packed by, and others, by which they make up for each other's errors."""

    inputs: list[mx.array]
    trail: list[mx.array]


@dataclass(frozen=True)
class Calibration:
    """Tokens, and where they are from.

    Attributes:
        batches: what the matrices are packed by: of tokens (B, L).
        written: how many of the last of them the model writes anew, all but a few tokens.
        trail: likewise, all written anew.
    """

    batches: tuple[mx.array, ...]
    words: str
    written: int = 0
    trail: tuple[mx.array, ...] = ()

    @classmethod
    def usual(cls, method: str, source: Source, resolved: Resolved) -> "Calibration":
        """Where nothing is named: what the model writes itself. gptq is given the text that comes along as well, for a
        model may not write all languages that it reads. Without a tokenizer there is none.
        """
        if method == "gptq":
            with suppress(TokenizerError):
                found = cls.text(BUNDLED, source, resolved)
                length = found.batches[0].shape[1]
                own = np.concatenate([np.asarray(batch).ravel() for batch in _random(resolved, method)])
                own = mx.array(own[: own.size // length * length].reshape(-1, length))
                words = f"{found.count:,} tokens of the text that comes with mlxarch, {_own(own.size)}"
                return replace(found, batches=(*found.batches, own), written=1, words=words)
        batches = tuple(_random(resolved, method))
        return cls(batches, _own(sum(batch.size for batch in batches)), len(batches))

    @classmethod
    def text(cls, file: str | Path, source: Source, resolved: Resolved) -> "Calibration":
        """The beginning of a text file, by the source's tokenizer.

        Raises:
            InvalidInput: the file cannot be read, or is no text.
            TokenizerError: the source has no tokenizer, or one of another model.
        """
        [text] = read_texts([file])
        ids = tokenizer_of(source).encode(text.content[:BYTES])[:MOST]
        if max(ids, default=0) >= resolved.model.vocab_size:
            raise TokenizerError(
                f"the tokenizer makes token {max(ids)} of a text, and the model has {resolved.model.vocab_size}"
            )
        batches = tuple(text_tokens(ids, resolved.model.context_length))
        return cls(batches, f"{sum(batch.size for batch in batches):,} tokens of {Path(file).name}")

    def beside(self, method: str, resolved: Resolved) -> "Calibration":
        """With what the method lets matrices make up for each other's errors by."""
        return replace(self, trail=tuple(_random(resolved, method, PATIENCE.get(method, 1), seed=1)))

    def tokens(self, resolved: Resolved, progress: Progress = silent, trail: bool = True) -> Tokens:
        """The tokens themselves, once the model has written."""
        fixed = list(self.batches[: len(self.batches) - self.written])
        firsts = [*self.batches[len(fixed) :], *(self.trail if trail else ())]
        written = continued(resolved, firsts, progress=progress)
        return Tokens(fixed + written[: self.written], written[self.written :])

    @property
    def count(self) -> int:
        """Tokens in all."""
        return sum(batch.size for batch in self.batches)

    @cached_property
    def digest(self) -> str:
        """Changes with any token."""
        facts = repr([self.written, *(batch.tolist() for batch in (*self.batches, *self.trail))])
        return hashlib.sha256(facts.encode()).hexdigest()


def token_count(resolved: Resolved, method: str) -> int:
    """How many tokens the model is to write: more for more channels, as long as time and memory allow it."""
    parameters = resolved.parameters
    shapes = [parameters[path].shape for path in resolved.matrices & parameters.keys()]
    elements, widest = sum(map(prod, shapes)), max((shape[-1] for shape in shapes), default=1)
    times = PATIENCE.get(method, 1)
    count = min(WORK // max(elements, 1), PER_CHANNEL * widest, times * ACTIVATIONS // (4 * widest), MOST)
    return max(times * count, LEAST)


def _random(resolved: Resolved, method: str, times: int = 1, seed: int = 0) -> list[mx.array]:
    model = resolved.model
    return random_tokens(model.vocab_size, model.context_length, times * token_count(resolved, method), seed)


def _own(count: int) -> str:
    return f"{count:,} tokens that the model wrote itself, in passages of {PASSAGE}"


def tokenizer_of(source: Source) -> Tokenizer:
    """The tokenizer that comes with a source.

    Raises:
        TokenizerError: none does, or it is not sound.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, at in source.sidecars.items():
            if isinstance(at, Path):
                shutil.copyfile(at, Path(folder) / name)
            else:
                (Path(folder) / name).write_bytes(at)
        try:
            return Tokenizer.from_folder(Path(folder))
        except TokenizerError as error:
            raise TokenizerError(str(error).replace(folder, "the source")) from None  # nobody knows of that folder

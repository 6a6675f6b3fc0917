"""The tokens whose way through a model tells which of its channels matter."""

import hashlib
import shutil
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import mlx.core as mx

from mlxarch.errors import TokenizerError
from mlxarch.quantize.corpus import read_texts
from mlxarch.quantize.importance import random_tokens, text_tokens
from mlxarch.tokenizer import Tokenizer
from mlxarch.weights import Resolved, Source

BUNDLED = Path(__file__).with_name("texts") / "calibration.txt"  # no evaluation reads it
MOST = 8192  # tokens of a text
BYTES = 16 * MOST  # of a text that are looked at for them


@dataclass(frozen=True)
class Calibration:
    """Batches of tokens (B, L), and where they are from; ``is_text`` is False of random ones."""

    batches: tuple[mx.array, ...]
    words: str
    is_text: bool = False

    @classmethod
    def random(cls, resolved: Resolved) -> "Calibration":
        """No text at all; see ``random_tokens``."""
        model = resolved.model
        return cls._of(random_tokens(model.vocab_size, model.context_length), "random tokens", False)

    @classmethod
    def usual(cls, method: str, source: Source, resolved: Resolved) -> "Calibration":
        """Where nothing is named. For a search, random tokens do nearly as well as text; gptq leans more on which
        channels are large together, and of that text tells more. Without a tokenizer there is none.
        """
        if method != "gptq":
            return cls.random(resolved)
        try:
            found = cls.text(BUNDLED, source, resolved)
        except TokenizerError:
            return cls.random(resolved)
        return replace(found, words=f"{found.count:,} tokens of the text that comes with mlxarch")

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
        return cls._of(text_tokens(ids, resolved.model.context_length), f"tokens of {Path(file).name}", True)

    @classmethod
    def _of(cls, batches: list[mx.array], what: str, is_text: bool) -> "Calibration":
        return cls(tuple(batches), f"{sum(batch.size for batch in batches):,} {what}", is_text)

    @property
    def count(self) -> int:
        """Tokens in all."""
        return sum(batch.size for batch in self.batches)

    @cached_property
    def digest(self) -> str:
        """Changes with any token."""
        facts = repr([batch.tolist() for batch in self.batches])
        return hashlib.sha256(facts.encode()).hexdigest()


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

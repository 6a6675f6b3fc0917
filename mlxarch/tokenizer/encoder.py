"""From a text to token ids: limits, special tokens at both ends, and control tokens kept as text."""

from collections.abc import Callable, Sequence
from functools import cached_property

import tokenizers

from mlxarch.errors import InvalidInput, TokenizerError
from mlxarch.tokenizer.control_tokens import MARK, SpelledTokens, without_marks
from mlxarch.tokenizer.load_json import translate_panics

MAX_TEXT_BYTES = 16 << 20
"""Largest text that is encoded, in bytes of UTF-8: some four million tokens."""


class Encoder:
    """Encoding with one tokenizer.

    Args:
        tokenizer: the library's object, complete with added tokens.
        max_text_bytes: largest text that the tokenizer encodes within seconds.
        control_tokens: texts of tokens that text of unknown origin must not become.
        prefix: ids to put before a text; None lets the library's post-processor decide.
        suffix: ids to put after a text.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        max_text_bytes: int,
        control_tokens: Sequence[str],
        prefix: Sequence[int] | None,
        suffix: Sequence[int],
    ):
        self._tokenizer = tokenizer
        self._limit = min(MAX_TEXT_BYTES, max_text_bytes)
        self._control_tokens = control_tokens
        self._prefix = prefix
        self._suffix = suffix

    def encode(self, text: str, *, add_special_tokens: bool, parse_special: bool) -> list[int]:
        """Convert a text to token ids; see ``Tokenizer.encode``."""
        self._check(text)
        if not parse_special:
            return self.encode_marked(self._spelled_tokens.mark(text), add_special_tokens)
        return self._encode(self._tokenizer, text, add_special_tokens)

    def encode_marked(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Convert a text to token ids in which marks keep control tokens from being found."""
        self._check(text)
        tokenizer = self._without_marks if MARK in text else self._tokenizer
        return self._encode(tokenizer, text, add_special_tokens)

    def _encode(
        self, tokenizer: tokenizers.Tokenizer, text: str, add_special_tokens: bool
    ) -> list[int]:
        by_library = add_special_tokens and self._prefix is None
        with translate_panics("tokenizing the text"):
            ids = tokenizer.encode(text, add_special_tokens=by_library).ids
        if not add_special_tokens or self._prefix is None:
            return ids
        return [*self._prefix, *ids, *self._suffix]

    def _check(self, text: str) -> None:
        if not isinstance(text, str):
            raise InvalidInput(f"a {type(text).__name__} cannot be encoded; a text (str) can.")
        try:
            size = len(text) if text.isascii() else len(text.encode())
        except UnicodeEncodeError as problem:
            raise TokenizerError(
                f"The text holds half of a surrogate pair (U+{ord(text[problem.start]):04X}) at "
                f"character {problem.start}, which is no character. Decode the text from its bytes "
                "again."
            ) from problem
        if size > self._limit:
            raise TokenizerError(
                f"The text has {size} bytes in UTF-8; at most {self._limit} are tokenized. "
                "Shorten it."
            )

    @cached_property
    def _spelled_tokens(self) -> SpelledTokens:
        return SpelledTokens(self._control_tokens, self.normalize)

    @cached_property
    def normalize(self) -> Callable[[str], str] | None:
        """Normalizer in whose output control tokens are searched for; None if there is none."""
        normalizer = self._tokenizer.normalizer
        return normalizer.normalize_str if normalizer and self._searches_normalized else None

    @cached_property
    def _searches_normalized(self) -> bool:
        added = self._tokenizer.get_added_tokens_decoder().values()
        control = set(self._control_tokens)
        return any(token.normalized for token in added if token.content in control)

    @cached_property
    def _without_marks(self) -> tokenizers.Tokenizer:
        normalized = self._searches_normalized
        with translate_panics("copying the tokenizer"):
            return without_marks(self._tokenizer, in_normalized_text=normalized)

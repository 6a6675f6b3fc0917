"""Control tokens that a text spells, kept as text.

A user's message, or a page that a tool has read, may contain ``<|im_end|>``. In a prompt it would
become the token that ends the turn. So a mark, a character that no text has, is put inside such a
string before the chat template is rendered; no token matches it then, and the tokenizer takes the
mark out between the search for added tokens and everything else. Tokens that the template itself
writes are not touched.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import tokenizers
from tokenizers import normalizers, pre_tokenizers

from mlxarch.tokenizer.added_tokens import find_tags, is_tag

MARK = "\ufdd0"
"""The mark, which Unicode reserves for internal use. A text that contains it gets U+FFFD instead."""

_THINKING_TAGS = ("<think>", "</think>", "[THINK]", "[/THINK]")
_OWN_ROLES = ("assistant", "developer", "system")
_OWN_TEXTS = ("content", "reasoning", "reasoning_content", "thinking")


class SpelledTokens:
    """Search for control tokens in texts.

    Args:
        tokens: texts of the control tokens.
        normalize: normalizer of the tokenizer, if it searches normalized texts for control tokens.
    """

    def __init__(self, tokens: Iterable[str], normalize: Callable[[str], str] | None = None):
        self._normalize = normalize
        self._tokens = sorted(token for token in tokens if len(token) > 1)
        self._longest = max(map(len, self._tokens), default=0)
        self._tags = frozenset(filter(is_tag, self._tokens))
        others = sorted(set(self._tokens) - self._tags, key=len, reverse=True)
        self._others = re.compile("|".join(map(re.escape, others))) if others else None

    def mark(self, text: str) -> str:
        """Put a mark behind the first character of each token, and behind a beginning at the end."""
        text = text.replace(MARK, "\ufffd")
        starts = self._find(text)
        if self._normalize is not None and not text.isascii():
            # NFKC makes "<" of "＜": a text that spells more tokens then is marked as it becomes
            normalized = self._normalize(text)
            found = self._find(normalized)
            if len(found) > len(starts) or self._ends_within_a_token(normalized):
                text = normalized
                starts = found
        if starts:
            cuts = [0, *(at + 1 for at in sorted(starts)), len(text)]
            text = MARK.join(text[start:end] for start, end in zip(cuts, cuts[1:], strict=False))
        # what follows in the prompt must not complete a token
        return text + MARK if self._ends_within_a_token(text) else text

    def _find(self, text: str) -> set[int]:
        """Positions at which a token is spelled."""
        starts = {at for at, tag in find_tags(text) if tag in self._tags}
        if self._others is not None:
            starts |= {match.start() for match in self._others.finditer(text)}
        return starts

    def _ends_within_a_token(self, text: str) -> bool:
        for size in range(1, min(self._longest, len(text) + 1)):
            end = text[-size:]
            place = bisect_left(self._tokens, end)
            if self._tokens[place : place + 1] and self._tokens[place].startswith(end):
                return True
        return False


class MessageMarker:
    """Marks the control tokens that messages spell.

    Texts of the model and of its operator keep tags such as ``<think>`` and ``<tool_call>``, which
    templates look for, unless they are special tokens.

    Args:
        special: texts of the special tokens.
        tags: texts of other added tokens that are spelled as tags.
        normalize: see ``SpelledTokens``.
    """

    def __init__(
        self,
        special: Iterable[str],
        tags: Iterable[str],
        normalize: Callable[[str], str] | None = None,
    ):
        special = set(special)
        self._every = SpelledTokens(special.union(tags), normalize)
        self._special = SpelledTokens(special.difference(_THINKING_TAGS), normalize)

    def mark_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return a message with marks in its texts."""
        own = message.get("role") in _OWN_ROLES
        return {
            key: _map_texts(
                value, self._special.mark if own and key in _OWN_TEXTS else self._every.mark
            )
            for key, value in message.items()
        }

    def mark(self, value: Any) -> Any:
        """Return a JSON value, such as the list of tools, with marks in its texts."""
        return _map_texts(value, self._every.mark)


def without_marks(
    tokenizer: tokenizers.Tokenizer, *, in_normalized_text: bool
) -> tokenizers.Tokenizer:
    """Return a copy of a tokenizer that searches for added tokens and then takes out the marks.

    Args:
        tokenizer: is not changed.
        in_normalized_text: whether control tokens are searched for in the normalized text. The
            marks stay in it then, and split words.
    """
    copy = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    if in_normalized_text:
        split = pre_tokenizers.Split(MARK, "removed")
        before = copy.pre_tokenizer
        copy.pre_tokenizer = pre_tokenizers.Sequence([split, before]) if before else split  # pyright: ignore
    else:
        remove = normalizers.Replace(MARK, "")
        before = copy.normalizer
        copy.normalizer = normalizers.Sequence([remove, before]) if before else remove  # pyright: ignore
    return copy


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return a copy of a JSON value with ``change`` applied to all its texts, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_map_texts(key, change): _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_texts(item, change) for item in value]
    return value

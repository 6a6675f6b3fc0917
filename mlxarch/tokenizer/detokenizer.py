"""Streaming detokenizer: token ids to text, one token at a time.

A token is a byte string, and one character may span several tokens. ``TokenByteDecoder`` reads the
``decoder`` section of a tokenizer.json once and then maps each token to its bytes;
``StreamingDetokenizer`` passes them through an incremental UTF-8 decoder. The cost per token is
constant, and no incomplete character is ever returned.

Supported decoders: ByteLevel (GPT-2 and its descendants), Metaspace, and SentencePiece's chain of
Replace, ByteFallback, Fuse and Strip. With any other, the whole text is returned at the end.
Invalid UTF-8 becomes U+FFFD, one for each maximal subpart, as the Unicode standard recommends.
"""

import codecs
import re
from collections.abc import Callable, Container, Sequence
from typing import Any

from mlxarch.tokenizer import byte_level

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenByteDecoder:
    """The ``decoder`` section of a tokenizer.json, as a function from a token to its bytes.

    Attributes:
        streamable: whether the decoder is supported; only then may the object be called.
        strip: a character, and how many of it are removed at the start of the text.
    """

    def __init__(self, decoder: dict[str, Any] | None):
        self._replacements: list[Callable[[str], str]] = []
        self._byte_alphabet: dict[str, int] | None = None
        self._byte_fallback = False
        self._metaspace: str | None = None
        self.strip: tuple[str, int] = ("", 0)
        self.streamable = decoder is not None and self._configure(_flatten(decoder))

    def __call__(self, token: str, first: bool, added: bool = False) -> bytes:
        """Return the bytes of a token.

        Args:
            token: token in the spelling of the vocabulary.
            first: whether it is the first token of the text.
            added: whether it is an added token. In a byte-level vocabulary these are text, and not
                bytes, even if each of their characters stands for a byte elsewhere.
        """
        if self._byte_alphabet is not None:
            if added:
                return token.encode()
            try:
                return bytes([self._byte_alphabet[character] for character in token])
            except KeyError:
                return token.encode()  # not of the vocabulary: plain text
        if self._metaspace is not None and first:
            token = token.replace(self._metaspace, "")
        for replace in self._replacements:
            token = replace(token)
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.encode()

    def _configure(self, steps: list[dict[str, Any]]) -> bool:
        """Read the steps of the decoder. Return whether all of them are supported."""
        fused = False
        for index, step in enumerate(steps):
            kind = step.get("type")
            if kind == "ByteLevel" and len(steps) == 1:
                self._byte_alphabet = byte_level.UNICODE_TO_BYTE
            elif kind == "Metaspace" and len(steps) == 1:
                mark = step.get("replacement", "▁")
                self._metaspace = None if step.get("prepend_scheme") == "never" else mark
                self._replacements.append(lambda token, mark=mark: token.replace(mark, " "))
            elif (
                kind == "Replace"
                and not fused
                and not self._byte_fallback
                and "String" in step.get("pattern", {})
            ):
                old = step["pattern"]["String"]
                new = step["content"]
                self._replacements.append(lambda token, old=old, new=new: token.replace(old, new))
            elif kind == "ByteFallback" and not fused:
                self._byte_fallback = True
            elif kind == "Fuse" and not fused:
                fused = True
            elif kind == "Strip" and fused and step.get("stop") == 0 and index == len(steps) - 1:
                self.strip = (step["content"], step["start"])
            else:
                return False
        return bool(steps)


def _flatten(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the steps of a decoder, nested sequences expanded."""
    if decoder.get("type") != "Sequence":
        return [decoder]
    return [step for inner in decoder.get("decoders", []) for step in _flatten(inner)]


class StreamingDetokenizer:
    """Incremental decoder of a growing sequence of tokens: ``add`` each, then ``finish`` once.

    The concatenated return values equal the decoded text of the whole sequence.

    Args:
        token_text: token id -> its string, or None for a token without text; raises for an id that
            does not exist.
        token_bytes: token string -> bytes.
        decode_all: decodes a whole sequence of ids; used for decoders that cannot stream.
        added: ids of added tokens.
        after: the ids that the sequence continues; their text is not returned.
    """

    def __init__(
        self,
        token_text: Callable[[int], str | None],
        token_bytes: TokenByteDecoder,
        decode_all: Callable[[Sequence[int]], str],
        *,
        added: Container[int] = (),
        after: Sequence[int] = (),
    ):
        self._token_text = token_text
        self._token_bytes = token_bytes
        self._decode_all = decode_all
        self._added = added
        self._after = () if token_bytes.streamable else tuple(after)
        self._pending_tokens: list[int] = []
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = True
        self._strip_character, self._strip_count = token_bytes.strip
        # only the start of a text is treated in another way, so only that is decoded
        if token_bytes.streamable and any(map(self.add, after)):
            self._utf8.reset()

    def add(self, token: int) -> str:
        """Return the text that the token completes; "" while it ends inside a character."""
        text = self._token_text(token)
        if not self._token_bytes.streamable:
            self._pending_tokens.append(token)
            return ""
        if text is None:
            return ""
        data = self._token_bytes(text, self._at_start, token in self._added)
        self._at_start = False
        return self._strip_start(self._utf8.decode(data))

    def finish(self) -> str:
        """Return the remaining text: U+FFFD for a character that was never completed."""
        if not self._token_bytes.streamable:
            before = self._decode_all(self._after) if self._after else ""
            whole = self._decode_all([*self._after, *self._pending_tokens])
            self._after = ()
            self._pending_tokens = []
            return whole[len(before) :]
        return self._strip_start(self._utf8.decode(b"", final=True))

    def _strip_start(self, text: str) -> str:
        while self._strip_count and text:
            if text[0] != self._strip_character:
                self._strip_count = 0
                break
            text = text[1:]
            self._strip_count -= 1
        return text

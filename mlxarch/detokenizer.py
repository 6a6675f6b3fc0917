"""Tokens to text, one token at a time.

A token is bytes, not text: one character may be spread over several tokens. ``TokenBytes`` reads the ``decoder``
section of tokenizer.json once and then gives each token's bytes; ``StreamingDetokenizer`` joins them through an
incremental UTF-8 decoder, so a token costs the same at the start of an answer and at its end, and no half character
comes out.

Known decoders: ByteLevel (GPT-2 and its heirs), the SentencePiece chain Replace, ByteFallback, Fuse, Strip, and
Metaspace. With any other, the text comes at the end, in one piece. Bytes that are no UTF-8 become U+FFFD, one for each
maximal subpart, as the Unicode standard recommends.
"""

import codecs
import re
from collections.abc import Callable, Sequence
from typing import Any

from mlxarch import byte_level

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """What the ``decoder`` section of a tokenizer.json does to the tokens, as bytes per token.

    ``streams`` tells whether the decoder is a known one; only then may the object be called.
    """

    def __init__(self, decoder: dict[str, Any] | None):
        self._steps: list[Callable[[str], str]] = []
        self._alphabet: dict[str, int] | None = None
        self._bytes_fall_back = False
        self._metaspace: str | None = None
        self.strip: tuple[str, int] = ("", 0)  # (character, how many of it go at the start of the text)
        self.streams = decoder is not None and self._read(_flat(decoder))

    def __call__(self, token: str, first: bool) -> bytes:
        """The bytes of a token; ``first``: it is the first one of the text."""
        if self._alphabet is not None:
            try:
                return bytes([self._alphabet[character] for character in token])
            except KeyError:
                return token.encode()  # an added token with characters of its own
        if self._metaspace is not None and first:
            token = token.replace(self._metaspace, "")
        for step in self._steps:
            token = step(token)
        if self._bytes_fall_back and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.encode()

    def _read(self, chain: list[dict[str, Any]]) -> bool:
        fused = False
        for index, step in enumerate(chain):
            kind = step.get("type")
            if kind == "ByteLevel" and len(chain) == 1:
                self._alphabet = byte_level.BYTES
            elif kind == "Metaspace" and len(chain) == 1:
                mark = step.get("replacement", "▁")
                self._metaspace = None if step.get("prepend_scheme") == "never" else mark
                self._steps.append(lambda token, mark=mark: token.replace(mark, " "))
            elif kind == "Replace" and not fused and not self._bytes_fall_back and "String" in step.get("pattern", {}):
                old, new = step["pattern"]["String"], step["content"]
                self._steps.append(lambda token, old=old, new=new: token.replace(old, new))
            elif kind == "ByteFallback" and not fused:
                self._bytes_fall_back = True
            elif kind == "Fuse" and not fused:
                fused = True
            elif kind == "Strip" and fused and step.get("stop") == 0 and index == len(chain) - 1:
                self.strip = (step["content"], step["start"])
            else:
                return False
        return bool(chain)


def _flat(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder.get("type") != "Sequence":
        return [decoder]
    return [step for part in decoder.get("decoders", []) for step in _flat(part)]


class StreamingDetokenizer:
    """Text of a growing sequence of tokens: ``add`` each token, then ``finish`` once.

    What they return, joined, is ``decode`` of the whole sequence.

    Args:
        token_text: token → its string, None for a token that shows nothing; raises for one that does not exist.
        token_bytes: the decoder.
        decode_all: decodes a whole sequence, for decoders that cannot stream.
    """

    def __init__(
        self,
        token_text: Callable[[int], str | None],
        token_bytes: TokenBytes,
        decode_all: Callable[[Sequence[int]], str],
    ):
        self._token_text = token_text
        self._token_bytes = token_bytes
        self._decode_all = decode_all
        self._held: list[int] = []
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True
        self._strip, self._to_strip = token_bytes.strip

    def add(self, token: int) -> str:
        """The text that this token completes: "" while it ends inside a character."""
        text = self._token_text(token)
        if not self._token_bytes.streams:
            self._held.append(token)
            return ""
        if text is None:
            return ""
        data = self._token_bytes(text, self._first)
        self._first = False
        return self._stripped(self._utf8.decode(data))

    def finish(self) -> str:
        """The rest: U+FFFD for a character that was never completed."""
        if not self._token_bytes.streams:
            held, self._held = self._held, []
            return self._decode_all(held)
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        while self._to_strip and text:
            if text[0] != self._strip:
                self._to_strip = 0
                break
            text, self._to_strip = text[1:], self._to_strip - 1
        return text

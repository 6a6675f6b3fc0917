"""tokenizer.json → a ``tokenizers.Tokenizer``: the file is data, so its sizes are checked before the library sees it.

The library panics on some files and texts (a pyo3 PanicException, which is a BaseException and would end a thread), and
loops for hours on others: chained replacements that multiply a text a billion times, words without a length limit,
nested regular expressions. Panics become TokenizerError; what can be told from the file is refused here. A regular
expression that is slow in another way stays: the library gives up on one match after ten million steps (about a
second), and that is then a TokenizerError too, but many slow matches in one text add up.

Truncation and padding sections are dropped: whoever runs a model decides what is cut.
"""

import base64
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import tokenizers

from mlxarch import byte_level
from mlxarch.errors import TokenizerError
from mlxarch.untrusted import REMEDY, shown

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 128 << 20
"""The largest published ones have 33 MB."""
MAX_TOKEN_ID = 1 << 24
MAX_EXPANSION = 64
"""How many times longer a normalizer or a decoder may make its text; NFKC needs 18."""

_MAX_STEPS = 64  # in one section
_MAX_STRING = 1 << 14  # in a section: a pattern, a content
_MAX_TOKEN_LENGTH = {"BPE": 4096, "WordLevel": 4096, "WordPiece": 4096, "Unigram": 512}  # characters
_MAX_WORD_LENGTH = 256  # characters; WordPiece takes time quadratic in it
_EXPANSIONS = {"NFKC": 18, "NFKD": 18, "NFC": 3, "NFD": 4, "Lowercase": 3, "BertNormalizer": 12}


class _AddedToken(msgspec.Struct):
    """What is read of an added token; the library checks the rest."""

    id: int
    content: str


@dataclass(frozen=True)
class LoadedTokenizer:
    """The library's object and what it does not tell.

    ``expansion`` is how many times longer, at most, normalization makes a text; ``vocab_size`` is 1 + the largest id.
    """

    tokenizer: tokenizers.Tokenizer
    decoder: dict[str, Any] | None
    expansion: int
    vocab_size: int


@contextmanager
def panics_are_errors(doing: str) -> Iterator[None]:
    """Turn whatever the tokenizers library raises, panics included, into TokenizerError("DOING failed: ...")."""
    try:
        yield
    except TokenizerError:
        raise
    except BaseException as problem:
        if not isinstance(problem, Exception) and type(problem).__name__ != "PanicException":
            raise  # KeyboardInterrupt, SystemExit
        raise TokenizerError(f"{doing} failed: {shown(str(problem))}. {REMEDY}") from problem


def load(data: bytes, name: str) -> LoadedTokenizer:
    """Check a tokenizer.json and build its tokenizer. ``name`` is the file's, for messages.

    Raises:
        TokenizerError: the file is not JSON of that form, breaks a limit, or the library refuses it.
    """
    try:
        document = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        model = msgspec.json.decode(document.get("model", b"null"), type=dict[str, msgspec.Raw])
        added = msgspec.json.decode(document.get("added_tokens", b"[]"), type=list[_AddedToken])
        sections = {
            key: msgspec.json.decode(document.get(key, b"null"), type=dict[str, Any] | None)
            for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder")
        }
        largest, vocabulary = _vocabulary(model, name)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as problem:
        raise TokenizerError(f"{name}: this is not a tokenizer.json ({problem}). {REMEDY}") from problem
    largest = max([largest, *(token.id for token in added)])
    if _is_miscut_tekken(vocabulary, sections["pre_tokenizer"]):
        logger.info("%s: its words are cut as those of another model; Mistral's own regular expression is used", name)
        sections["pre_tokenizer"] = byte_level.split_by(byte_level.TEKKEN)
        document["pre_tokenizer"] = msgspec.Raw(msgspec.json.encode(sections["pre_tokenizer"]))
    expansions = {key: _expansion(section, f"{name}: {key}") for key, section in sections.items()}
    document |= {"truncation": msgspec.Raw(b"null"), "padding": msgspec.Raw(b"null")}
    with panics_are_errors(f"{name}: building the tokenizer"):
        # Written anew, so that the library reads what was checked: a key that is there twice is gone.
        text = msgspec.json.encode(document | {"model": model}).decode()
        tokenizer = tokenizers.Tokenizer.from_str(text)
    expansion = expansions["normalizer"] * expansions["pre_tokenizer"]
    return LoadedTokenizer(tokenizer, sections["decoder"], expansion, largest + 1)


def _is_miscut_tekken(vocabulary: Mapping[str, int], pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether this is Mistral's Tekken with GPT-4's regular expression, or none, instead of its own.

    Conversions of tekken.json were published so, Mistral Small 3.1's among them; numbers and capitals then become
    tokens that the model never saw. What tells the vocabulary: 1000 special tokens, then the 256 bytes in their order.
    Source: transformers' ``fix_mistral_regex``; tekken.json of mistral-common.
    """
    bytes_in_order = all(vocabulary.get(byte_level.as_text(bytes([byte]))) == 1000 + byte for byte in range(256))
    patterns = [node["Regex"] for node in _nodes(pre_tokenizer) if isinstance(node, dict) and "Regex" in node]
    return bytes_in_order and "[INST]" in vocabulary and patterns in ([], [byte_level.GPT4])


def _vocabulary(model: dict[str, msgspec.Raw], name: str) -> tuple[int, dict[str, int]]:
    """The largest id, and the ids of all tokens (none for Unigram)."""
    kind = msgspec.json.decode(model.get("type", b'"BPE"'), type=str)  # the oldest files, all BPE, leave it out
    if kind not in _MAX_TOKEN_LENGTH:
        raise TokenizerError(f"{name}: the model type is {shown(kind)}; known are {', '.join(_MAX_TOKEN_LENGTH)}.")
    vocabulary = model.get("vocab", b"null")
    if kind == "Unigram":
        tokens = [token for token, _ in msgspec.json.decode(vocabulary, type=list[tuple[str, float]])]
        largest, ids = len(tokens) - 1, {}
    else:
        ids = msgspec.json.decode(vocabulary, type=dict[str, int])
        tokens, largest = list(ids), max(ids.values(), default=-1)
        if min(ids.values(), default=0) < 0 or largest >= MAX_TOKEN_ID:
            raise TokenizerError(f"{name}: a token id is outside 0 to {MAX_TOKEN_ID - 1}. {REMEDY}")
    longest = max(map(len, tokens), default=0)
    if longest > _MAX_TOKEN_LENGTH[kind]:
        raise TokenizerError(
            f"{name}: a token has {longest} characters; {kind} may have {_MAX_TOKEN_LENGTH[kind]}. {REMEDY}"
        )
    word = msgspec.json.decode(model.get("max_input_chars_per_word", b"100"), type=int)
    if kind == "WordPiece" and word > _MAX_WORD_LENGTH:
        raise TokenizerError(
            f"{name}: max_input_chars_per_word is {word}, and may be at most {_MAX_WORD_LENGTH}: the time that a word "
            f"takes grows with its square. {REMEDY}"
        )
    if kind == "BPE" and msgspec.json.decode(model.get("continuing_subword_prefix", b"null"), type=str | None):
        # The library cuts its length off each merge unseen, even in the midst of a character, which can abort Python.
        raise TokenizerError(f"{name}: the BPE model has a continuing_subword_prefix, which is not supported.")
    return largest, ids


def _expansion(section: dict[str, Any] | None, where: str) -> int:
    """How many times longer the section's steps, one after the other, can make a text. Checks them on the way."""
    steps = [node for node in _nodes(section) if isinstance(node, dict) and "type" in node]
    if len(steps) > _MAX_STEPS:
        raise TokenizerError(f"{where} has {len(steps)} steps, and may have {_MAX_STEPS}. {REMEDY}")
    for node in _nodes(section):
        for key, value in node.items() if isinstance(node, dict) else ():
            if isinstance(value, str) and len(value) > _MAX_STRING and key != "precompiled_charsmap":
                raise TokenizerError(
                    f"{where}: {key} has {len(value)} characters, and may have {_MAX_STRING}. {REMEDY}"
                )
            if key == "Regex" and isinstance(value, str):
                _check_regex(value, where)
    factor = 1
    for step in steps:
        factor *= _step_expansion(step)
        if factor > MAX_EXPANSION:
            raise TokenizerError(
                f"{where} can make a text more than {MAX_EXPANSION} times longer, the most that is allowed. {REMEDY}"
            )
    return factor


def _nodes(value: Any) -> Iterator[Any]:
    yield value
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        yield from _nodes(child)


def _step_expansion(step: dict[str, Any]) -> int:
    kind = step["type"]
    if kind == "Replace":
        pattern = step.get("pattern")
        replaced = _length(pattern.get("String")) if isinstance(pattern, dict) else 0
        content = _length(step.get("content"))
        # A regular expression, or nothing, may match at every character without taking it away.
        return max(1, -(-content // replaced)) if replaced else content + 1
    if kind == "Prepend":
        return max(1, _length(step.get("prepend")))
    if kind == "Precompiled":
        return max(1, _longest_replacement(step.get("precompiled_charsmap")))
    return _EXPANSIONS.get(kind, 1) if isinstance(kind, str) else 1


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str) else 0  # the library refuses what is no text


def _longest_replacement(charsmap: Any) -> int:
    """Characters in the longest string of a SentencePiece charsmap: u32 size, a trie of that size, strings with NUL."""
    try:
        data = base64.b64decode(charsmap, validate=True)
        strings = data[4 + int.from_bytes(data[:4], "little") :].decode("utf-8", "replace")
    except (TypeError, ValueError):
        return 1  # the library refuses it
    return max(map(len, strings.split("\0")))


_REGEX_PART = re.compile(
    r"\\.|(?P<open>\((?:\?[^:()]*:?)?)|(?P<close>\))|(?P<repeat>[*+]|\{\d*,?\d*\})[?+]?|[^\\]", re.DOTALL
)


def _check_regex(pattern: str, where: str) -> None:
    """Refuse a repeat of what itself repeats without end, such as ``(a+)+``: it takes time exponential in the text."""
    endless = [False]  # per open group: it holds a repeat without end
    closed = False  # a group that holds one was just closed
    classes = 0  # open brackets of a character class
    for part in _REGEX_PART.finditer(pattern):
        text = part[0]
        if text == "[":
            classes += 1
        elif text == "]" and classes:
            classes -= 1
        if classes or text == "]":
            closed = False
        elif part["open"]:
            endless.append(False)
            closed = False
        elif part["close"]:
            closed = endless.pop() if len(endless) > 1 else False
            endless[-1] |= closed
        elif part["repeat"]:
            limit = part["repeat"].strip("{}").split(",")[-1]
            if closed and limit != "1":
                raise TokenizerError(
                    f"{where}: the regular expression {shown(pattern)} repeats a group that repeats without end, which "
                    f"can take hours on a short text. {REMEDY}"
                )
            endless[-1] |= not limit.isdigit()
            closed = False
        else:
            closed = False

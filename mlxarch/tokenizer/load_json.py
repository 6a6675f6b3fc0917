"""Validate a tokenizer.json and build a ``tokenizers.Tokenizer`` from it.

The file is untrusted data, so its sizes are checked before the library parses it. On some files and
texts the library panics: pyo3's PanicException derives from BaseException and would end a thread.
On others it loops for hours: chained replacements that lengthen a text a billion times, words
without a length limit, nested repetitions in regular expressions. Panics are raised as
TokenizerError, and files that show such a problem are rejected here. Other slow regular expressions
remain possible: the library gives up on one match after ten million steps (about a second), which
is a TokenizerError too, but many slow matches in one text add up.

The truncation and padding sections are dropped: the caller decides how to truncate a prompt.
"""

import base64
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import tokenizers

from mlxarch.errors import TokenizerError
from mlxarch.system.untrusted_files import REMEDY, short_repr
from mlxarch.tokenizer.repair import repaired_sections, walk

MAX_FILE_BYTES = 128 << 20
"""Largest file that is read; the largest published ones have 33 MB."""
MAX_TOKEN_ID = 1 << 24
"""Exclusive upper bound of token ids."""
MAX_ADDED_TOKENS = 1 << 17
"""Largest number of added tokens."""
MAX_EXPANSION = 64
"""Largest factor by which a section may lengthen a text; NFKC needs 18."""

# The search for added tokens takes about 150 bytes for each of their characters.
_MAX_ADDED_CHARACTERS = 1 << 21
_MAX_STEPS = 64  # in one section
_MAX_STRING_LENGTH = 1 << 14  # of a pattern or a content in a section
_MAX_TOKEN_LENGTH = {  # characters
    "BPE": 4096,
    "WordLevel": 4096,
    "WordPiece": 4096,
    "Unigram": 512,
}
_MAX_WORD_LENGTH = 256  # characters; WordPiece takes time quadratic in it
_EXPANSIONS = {"NFKC": 18, "NFKD": 18, "NFC": 3, "NFD": 4, "Lowercase": 3, "BertNormalizer": 12}


class _AddedToken(msgspec.Struct):
    """The checked fields of an added token; the library validates the others."""

    id: int
    content: str


@dataclass(frozen=True)
class LoadedTokenizer:
    """A ``tokenizers.Tokenizer`` and facts that it does not expose.

    Attributes:
        tokenizer: the library's object.
        decoder: the ``decoder`` section of the tokenizer.json.
        max_expansion: largest factor by which normalization can lengthen a text.
        vocab_size: 1 + the largest id.
    """

    tokenizer: tokenizers.Tokenizer
    decoder: dict[str, Any] | None
    max_expansion: int
    vocab_size: int


@contextmanager
def translate_panics(action: str) -> Iterator[None]:
    """Raise any error of the tokenizers library, panics included, as a TokenizerError.

    Its message begins with "ACTION failed: ".
    """
    try:
        yield
    except TokenizerError:
        raise
    except BaseException as problem:
        if not isinstance(problem, Exception) and type(problem).__name__ != "PanicException":
            raise  # KeyboardInterrupt, SystemExit
        raise TokenizerError(f"{action} failed: {short_repr(str(problem))}. {REMEDY}") from problem


def check_added_tokens(texts: Sequence[str], name: str) -> None:
    """Check the number and the total length of added tokens.

    Raises:
        TokenizerError: there are more than the limits.
    """
    characters = sum(map(len, texts))
    if len(texts) > MAX_ADDED_TOKENS or characters > _MAX_ADDED_CHARACTERS:
        raise TokenizerError(
            f"{name}: {len(texts)} added tokens with {characters} characters; at most "
            f"{MAX_ADDED_TOKENS} with {_MAX_ADDED_CHARACTERS} are read. {REMEDY}"
        )


def load_tokenizer_json(data: bytes, name: str) -> LoadedTokenizer:
    """Validate a tokenizer.json and build its tokenizer.

    Args:
        data: contents of the file.
        name: file name for error messages.

    Raises:
        TokenizerError: the file is not a tokenizer.json, exceeds a limit, or the library rejects
            it.
    """
    try:
        document = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        model = msgspec.json.decode(document.get("model", b"null"), type=dict[str, msgspec.Raw])
        added = msgspec.json.decode(document.get("added_tokens", b"[]"), type=list[_AddedToken])
        sections = {
            key: msgspec.json.decode(document.get(key, b"null"), type=dict[str, Any] | None)
            for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder")
        }
        largest_id, vocabulary = _check_model(model, name)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as problem:
        raise TokenizerError(
            f"{name}: this is not a tokenizer.json ({problem}). {REMEDY}"
        ) from problem
    check_added_tokens([token.content for token in added], name)
    largest_id = max([largest_id, *(token.id for token in added)])
    expansions = {
        key: _check_section(section, f"{name}: {key}") for key, section in sections.items()
    }
    for key, section in repaired_sections(vocabulary, sections, name).items():
        sections[key] = section
        document[key] = msgspec.Raw(msgspec.json.encode(section))
    document |= {"truncation": msgspec.Raw(b"null"), "padding": msgspec.Raw(b"null")}
    with translate_panics(f"{name}: building the tokenizer"):
        # Encoded again, so that the library parses what was checked: duplicate keys are gone.
        text = msgspec.json.encode(document | {"model": model}).decode()
        tokenizer = tokenizers.Tokenizer.from_str(text)
    max_expansion = expansions["normalizer"] * expansions["pre_tokenizer"]
    return LoadedTokenizer(tokenizer, sections["decoder"], max_expansion, largest_id + 1)


def _check_model(model: dict[str, msgspec.Raw], name: str) -> tuple[int, dict[str, int]]:
    """Validate the ``model`` section.

    Returns:
        The largest token id, and token -> id (for Unigram, the position in the list).
    """
    # the oldest files, all of them BPE, have no type
    kind = msgspec.json.decode(model.get("type", b'"BPE"'), type=str)
    if kind not in _MAX_TOKEN_LENGTH:
        raise TokenizerError(
            f"{name}: the model type is {short_repr(kind)}; "
            f"known are {', '.join(_MAX_TOKEN_LENGTH)}."
        )
    vocab = model.get("vocab", b"null")
    if kind == "Unigram":
        scored = msgspec.json.decode(vocab, type=list[tuple[str, float]])
        tokens = [token for token, _ in scored]
        ids = {token: index for index, token in enumerate(tokens)}
        largest_id = len(tokens) - 1
    else:
        ids = msgspec.json.decode(vocab, type=dict[str, int])
        tokens = list(ids)
        largest_id = max(ids.values(), default=-1)
        if min(ids.values(), default=0) < 0 or largest_id >= MAX_TOKEN_ID:
            raise TokenizerError(f"{name}: a token id is outside 0 to {MAX_TOKEN_ID - 1}. {REMEDY}")
    longest = max(map(len, tokens), default=0)
    if longest > _MAX_TOKEN_LENGTH[kind]:
        raise TokenizerError(
            f"{name}: a token has {longest} characters; {kind} may have "
            f"{_MAX_TOKEN_LENGTH[kind]}. {REMEDY}"
        )
    word_length = msgspec.json.decode(model.get("max_input_chars_per_word", b"100"), type=int)
    if kind == "WordPiece" and word_length > _MAX_WORD_LENGTH:
        raise TokenizerError(
            f"{name}: max_input_chars_per_word is {word_length}, and may be at most "
            f"{_MAX_WORD_LENGTH}: the time that a word takes grows with its square. {REMEDY}"
        )
    prefix = model.get("continuing_subword_prefix", b"null")
    if kind == "BPE" and msgspec.json.decode(prefix, type=str | None):
        # The library cuts the prefix's length off each merge without a check, even in the middle
        # of a character, which can abort the process.
        raise TokenizerError(
            f"{name}: the BPE model has a continuing_subword_prefix, which is not supported."
        )
    return largest_id, ids


def _check_section(section: dict[str, Any] | None, where: str) -> int:
    """Validate a section. Return the largest factor by which its steps can lengthen a text."""
    steps = [node for node in walk(section) if isinstance(node, dict) and "type" in node]
    if len(steps) > _MAX_STEPS:
        raise TokenizerError(f"{where} has {len(steps)} steps, and may have {_MAX_STEPS}. {REMEDY}")
    for node in walk(section):
        for key, value in node.items() if isinstance(node, dict) else ():
            if isinstance(value, str):
                _check_string(key, value, where)
    factor = 1
    for step in steps:
        factor *= _step_expansion(step)
        if factor > MAX_EXPANSION:
            raise TokenizerError(
                f"{where} can make a text more than {MAX_EXPANSION} times longer, the most that is "
                f"allowed. {REMEDY}"
            )
    return factor


def _check_string(key: str, value: str, where: str) -> None:
    if len(value) > _MAX_STRING_LENGTH and key != "precompiled_charsmap":
        raise TokenizerError(
            f"{where}: {key} has {len(value)} characters, and may have {_MAX_STRING_LENGTH}. "
            f"{REMEDY}"
        )
    if key == "Regex":
        _check_regex(value, where)


def _step_expansion(step: dict[str, Any]) -> int:
    """Return the largest factor by which one step can lengthen a text."""
    kind = step["type"]
    if kind == "Replace":
        pattern = step.get("pattern")
        replaced = _length(pattern.get("String")) if isinstance(pattern, dict) else 0
        content = _length(step.get("content"))
        if not replaced:
            # a regular expression, or an empty text, can match at every character without
            # removing it
            return content + 1
        return max(1, -(-content // replaced))
    if kind == "Prepend":
        return max(1, _length(step.get("prepend")))
    if kind == "Precompiled":
        return max(1, _longest_replacement(step.get("precompiled_charsmap")))
    return _EXPANSIONS.get(kind, 1) if isinstance(kind, str) else 1


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str) else 0  # the library rejects other types


def _longest_replacement(charsmap: Any) -> int:
    """Return the length in characters of the longest string in a SentencePiece charsmap.

    Its format: the size of a trie as a 32-bit integer, the trie, and NUL-terminated strings.
    """
    try:
        data = base64.b64decode(charsmap, validate=True)
        strings = data[4 + int.from_bytes(data[:4], "little") :].decode("utf-8", "replace")
    except (TypeError, ValueError):
        return 1  # the library rejects it
    return max(map(len, strings.split("\0")))


_REGEX_TOKEN = re.compile(
    r"\\.|(?P<open>\((?:\?[^:()]*:?)?)|(?P<close>\))"
    r"|(?P<quantifier>[*+]|\{\d*,?\d*\})[?+]?|[^\\]",
    re.DOTALL,
)


def _check_regex(pattern: str, where: str) -> None:
    """Reject nested unbounded quantifiers such as ``(a+)+``, which can take exponential time."""
    unbounded = [False]  # for each open group: whether it contains an unbounded quantifier
    after_unbounded_group = False  # whether the previous token closed such a group
    brackets = 0  # open brackets of character classes
    for token in _REGEX_TOKEN.finditer(pattern):
        text = token[0]
        if text == "[":
            brackets += 1
        elif text == "]" and brackets:
            brackets -= 1
        if brackets or text == "]":
            after_unbounded_group = False
        elif token["open"]:
            unbounded.append(False)
            after_unbounded_group = False
        elif token["close"]:
            after_unbounded_group = unbounded.pop() if len(unbounded) > 1 else False
            unbounded[-1] |= after_unbounded_group
        elif token["quantifier"]:
            limit = token["quantifier"].strip("{}").split(",")[-1]
            if after_unbounded_group and limit != "1":
                raise TokenizerError(
                    f"{where}: the regular expression {short_repr(pattern)} repeats a group that "
                    f"repeats without end, which can take hours on a short text. {REMEDY}"
                )
            unbounded[-1] |= not limit.isdigit()
            after_unbounded_group = False
        else:
            after_unbounded_group = False

"""Validate a tokenizer.json and build a ``tokenizers.Tokenizer`` from it.

The file is untrusted data, so its sizes are checked before the library parses it. On some files and
texts the library panics: pyo3's PanicException derives from BaseException and would end a thread.
On others it loops for hours: chained replacements that lengthen a text a billion times, words
without a length limit, nested repetitions in regular expressions. Panics are raised as
TokenizerError, and files that show such a problem are rejected here. So is what would take more
than seconds or a few gigabytes: sizes and counts have limits, and so has the text, by what the
sections can cost.

The truncation and padding sections are dropped: the caller decides how to truncate a prompt.
"""

import base64
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import tokenizers

from mlxarch.errors import TokenizerError
from mlxarch.system.untrusted_files import REMEDY, short_repr
from mlxarch.tokenizer.sections.regular_expressions import CostlyPattern, is_quadratic
from mlxarch.tokenizer.sections.repair import repaired_sections, walk

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 64 << 20
"""Largest file that is read; the largest published ones have 33 MB."""
MAX_TOKEN_ID = 1 << 24
"""Exclusive upper bound of token ids."""
MAX_ADDED_TOKENS = 1 << 17
"""Largest number of added tokens."""
MAX_EXPANSION = 64
"""Largest factor by which a section may lengthen a text; NFKC needs 18."""
MAX_NORMALIZED_BYTES = 16 << 20
"""Largest size that normalization may give to a text; a token of each byte takes 180 bytes."""
MAX_QUADRATIC_BYTES = 1 << 14
"""Largest text for a regular expression that takes quadratic time: about two seconds."""
_MAX_TEXT_BY_STEP = 1 << 26  # bytes of a text times steps, or times the longest token: seconds

# The search for added tokens takes about 150 bytes for each of their characters.
_MAX_ADDED_CHARACTERS = 1 << 21
_MAX_STEPS = 16  # in one section
_MAX_SECTION_BYTES = 4 << 20
_MAX_SECTION_VALUES = 4096  # objects, lists, texts and numbers of one section
_MAX_TOKENS = 1 << 21
_MAX_MERGES_COMMAS = 1 << 23  # in the list of merges: two or more for each
_MAX_STRING_LENGTH = 1 << 14  # of a pattern or a content in a section
_MAX_TOKEN_LENGTH = {  # characters
    "BPE": 4096,
    "WordLevel": 4096,
    "WordPiece": 4096,
    "Unigram": 512,
}
_MAX_WORD_LENGTH = 256  # characters; WordPiece takes time quadratic in it
_SECTIONS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
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
        max_text_bytes: largest text that is encoded within seconds and a few gigabytes.
        vocab_size: 1 + the largest id.
    """

    tokenizer: tokenizers.Tokenizer
    decoder: dict[str, Any] | None
    max_text_bytes: int
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
        sections = {key: _read_section(document, key, name) for key in _SECTIONS}
        largest_id, vocabulary, text_limit = _check_model(model, name)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as problem:
        raise TokenizerError(
            f"{name}: this is not a tokenizer.json ({problem}). {REMEDY}"
        ) from problem
    check_added_tokens([token.content for token in added], name)
    largest_id = max([largest_id, *(token.id for token in added)])
    limits = [_check_section(section, f"{name}: {key}") for key, section in sections.items()]
    for key, section in repaired_sections(vocabulary, sections, name).items():
        sections[key] = section
        document[key] = msgspec.Raw(msgspec.json.encode(section))
    document |= {"truncation": msgspec.Raw(b"null"), "padding": msgspec.Raw(b"null")}
    with translate_panics(f"{name}: building the tokenizer"):
        # Encoded again, so that the library parses what was checked: duplicate keys are gone.
        text = msgspec.json.encode(document | {"model": model}).decode()
        tokenizer = tokenizers.Tokenizer.from_str(text)
    _warn_of_other_ids(tokenizer, added, name)
    max_text_bytes = min(text_limit, *limits)
    return LoadedTokenizer(tokenizer, sections["decoder"], max_text_bytes, largest_id + 1)


def _warn_of_other_ids(
    tokenizer: tokenizers.Tokenizer, added: Sequence[_AddedToken], name: str
) -> None:
    """Warn of added tokens whose id the library has replaced: it numbers them without gaps."""
    other = [token for token in added if tokenizer.token_to_id(token.content) != token.id]
    if other:
        first = other[0]
        logger.warning(
            "%s: added tokens whose id differs from the one in the file: %d; %s has %s, not %d; "
            "check that tokenizer and weights belong together",
            name,
            len(other),
            short_repr(first.content),
            tokenizer.token_to_id(first.content),
            first.id,
        )


def _read_section(document: dict[str, msgspec.Raw], key: str, name: str) -> dict[str, Any] | None:
    data = document.get(key, msgspec.Raw(b"null"))
    if len(data) > _MAX_SECTION_BYTES:
        raise TokenizerError(
            f"{name}: {key} has {len(data)} bytes, and may have {_MAX_SECTION_BYTES}. {REMEDY}"
        )
    section = msgspec.json.decode(data, type=dict[str, Any] | None)
    count = sum(1 for _ in walk(section))
    if count > _MAX_SECTION_VALUES:
        raise TokenizerError(
            f"{name}: {key} has {count} values, and may have {_MAX_SECTION_VALUES}. {REMEDY}"
        )
    return section


def _check_model(model: dict[str, msgspec.Raw], name: str) -> tuple[int, dict[str, int], int]:
    """Validate the ``model`` section.

    Returns:
        The largest token id, and token -> id (for Unigram, the position in the list),
        and the size of the largest text that the model encodes within seconds.
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
    if (
        len(tokens) > _MAX_TOKENS
        or bytes(model.get("merges", b"")).count(b",") > _MAX_MERGES_COMMAS
    ):
        raise TokenizerError(
            f"{name}: {len(tokens)} tokens, and merges with "
            f"{bytes(model.get('merges', b'')).count(b',')} commas; at most {_MAX_TOKENS} and "
            f"{_MAX_MERGES_COMMAS} are read. {REMEDY}"
        )
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
    steps = {"Unigram": longest, "WordPiece": word_length}.get(kind, 1)
    return largest_id, ids, _MAX_TEXT_BY_STEP // max(steps, 1)


def _check_section(section: dict[str, Any] | None, where: str) -> int:
    """Validate a section. Return the size of the largest text that it may get."""
    steps = [node for node in walk(section) if isinstance(node, dict) and "type" in node]
    if len(steps) > _MAX_STEPS:
        raise TokenizerError(f"{where} has {len(steps)} steps, and may have {_MAX_STEPS}. {REMEDY}")
    limit = _MAX_TEXT_BY_STEP // max(len(steps), 1)
    for node in walk(section):
        for key, value in node.items() if isinstance(node, dict) else ():
            if isinstance(value, str) and _is_quadratic(key, value, where):
                limit = MAX_QUADRATIC_BYTES
    factor = 1
    for step in steps:
        factor *= _step_expansion(step)
        if factor > MAX_EXPANSION:
            raise TokenizerError(
                f"{where} can make a text more than {MAX_EXPANSION} times longer, the most that is "
                f"allowed. {REMEDY}"
            )
    return min(limit, MAX_NORMALIZED_BYTES // factor)


def _is_quadratic(key: str, value: str, where: str) -> bool:
    """Check a text of a section. Return whether it is a regular expression of quadratic time."""
    if len(value) > _MAX_STRING_LENGTH and key != "precompiled_charsmap":
        raise TokenizerError(
            f"{where}: {key} has {len(value)} characters, and may have {_MAX_STRING_LENGTH}. "
            f"{REMEDY}"
        )
    try:
        return key == "Regex" and is_quadratic(value)
    except CostlyPattern as problem:
        raise TokenizerError(
            f"{where}: the regular expression {short_repr(value)} {problem}; it could take hours on "
            f"a short text. {REMEDY}"
        ) from None


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

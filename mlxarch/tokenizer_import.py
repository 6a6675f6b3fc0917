"""Byte-level BPE in its publishers' own files → the contents of a tokenizer.json.

    tiktoken.model             lines of base64 and rank; Kimi, whose special tokens are in tokenizer_config.json
    tekken.json                Mistral
    tokenizer.tok.json         Grok 2.5
    vocab.json, merges.txt     GPT-2 and Qwen, in folders without a tokenizer.json

The first three list tokens with ranks and no merges: two neighbours become one token wherever together they are one,
the lowest rank first, and a word that is a token is not cut at all. A list of all pairs that make a token, in the order
of its rank, says the same.
"""

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from mlxarch import byte_level
from mlxarch.errors import TokenizerError
from mlxarch.untrusted import REMEDY, shown

MAX_FILE_BYTES = 64 << 20
"""The largest published ones have 20 MB."""
_MAX_ID = 1 << 24
_MAX_SPECIAL = 1 << 16
_MAX_TOKEN_BYTES = 512
_MAX_ALL_BYTES = 16 << 20  # of all tokens together; published vocabularies have 1.5 MB

# Special tokens of the tekken.json files that do not list their own (up to version v7).
# Source: SpecialTokens and Tekkenizer of mistral-common.
_TEKKEN_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
# How sglang, with which its maker serves it, writes a conversation with Grok 2.5; no file of the model says it.
_GROK_TEMPLATE = (
    "{%- set names = {'user': 'Human: ', 'system': 'System: ', 'assistant': 'Assistant: '} -%}"
    "{%- for message in messages if message['role'] in names -%}"
    "{%- set text = message['content'] -%}"
    "{{- names[message['role']] + (text if message['role'] == 'assistant' else text.strip()) -}}"
    "{{- '<|separator|>\\n\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"
)
# What mistral-common writes from version v7 of its format on; tools need a template of the model's own.
_TEKKEN_TEMPLATE = (
    "{%- if tools -%}{{- raise_exception('This template knows no tools.') -}}{%- endif -%}"
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{- '[SYSTEM_PROMPT]' + message['content'] + '[/SYSTEM_PROMPT]' -}}"
    "{%- elif message['role'] == 'user' -%}{{- '[INST]' + message['content'] + '[/INST]' -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- message['content'] + eos_token -}}"
    "{%- else -%}{{- raise_exception('The roles are system, user and assistant.') -}}{%- endif -%}"
    "{%- endfor -%}"
)


@dataclass(frozen=True)
class Imported:
    """A tokenizer.json, and what tokenizer_config.json would say beside it."""

    data: bytes
    settings: dict[str, Any] = field(default_factory=dict)


class _TekkenToken(msgspec.Struct):
    rank: int
    token_bytes: str


class _TekkenSpecial(msgspec.Struct):
    rank: int
    token_str: str


class _TekkenConfig(msgspec.Struct):
    pattern: str
    default_vocab_size: int
    default_num_special_tokens: int
    version: str = ""


class _Tekken(msgspec.Struct):
    config: _TekkenConfig
    vocab: list[_TekkenToken]
    special_tokens: list[_TekkenSpecial] | None = None


class _GrokToken(msgspec.Struct):
    bytes: list[Annotated[int, msgspec.Meta(ge=0, le=255)]]
    token: int


class _Grok(msgspec.Struct):
    regular_tokens: list[_GrokToken]
    special_tokens: list[_GrokToken]
    word_split: str
    pat_str: str | None = None


def tiktoken(data: bytes, settings: Mapping[str, Any], name: str = "tiktoken.model") -> Imported:
    """Kimi's. ``settings`` is the contents of its tokenizer_config.json.

    Raises:
        TokenizerError: another model's, whose words nobody tells how to find; or the file is damaged.
    """
    if settings.get("tokenizer_class") != "TikTokenTokenizer":
        raise TokenizerError(
            f"{name}: its regular expression is not in the file, and known for tokenizer_class 'TikTokenTokenizer' "
            f"(Kimi) alone; tokenizer_config.json says {shown(settings.get('tokenizer_class'))}. Take a version of the "
            "model with a tokenizer.json."
        )
    tokens: list[tuple[bytes, int]] = []
    try:
        for line in filter(None, data.splitlines()):
            token, _, rank = line.partition(b" ")
            tokens.append((base64.b64decode(token, validate=True), _number(rank)))
    except ValueError as problem:
        raise TokenizerError(
            f"{name}: line {len(tokens) + 1} is not base64 and a number ({problem}). {REMEDY}"
        ) from None
    return Imported(_by_ranks(tokens, _added(settings), byte_level.KIMI, name))


def tekken(data: bytes, name: str = "tekken.json") -> Imported:
    """Mistral's: special tokens come first, and the vocabulary is cut to the size that the model has."""
    file = _decoded(data, _Tekken, name)
    special_count = file.config.default_num_special_tokens
    size = file.config.default_vocab_size - special_count
    if not 0 < size <= len(file.vocab) or not 3 <= special_count <= _MAX_SPECIAL:
        raise TokenizerError(
            f"{name}: {special_count} special tokens in a vocabulary of {file.config.default_vocab_size}, with "
            f"{len(file.vocab)} others listed, cannot be. {REMEDY}"
        )
    listed = file.special_tokens
    texts = dict(enumerate(_TEKKEN_SPECIAL)) if listed is None else {token.rank: token.token_str for token in listed}
    special = {texts.get(rank, f"<SPECIAL_{rank}>"): rank for rank in range(special_count)}
    try:
        tokens = [
            (base64.b64decode(token.token_bytes, validate=True), token.rank + special_count)
            for token in file.vocab
            if token.rank < size
        ]
    except ValueError as problem:
        raise TokenizerError(f"{name}: a token is not base64 ({problem}). {REMEDY}") from None
    names = {key: texts.get(rank) for key, rank in (("bos_token", 1), ("eos_token", 2), ("unk_token", 0))}
    settings: dict[str, Any] = {"add_bos_token": True} | {key: text for key, text in names.items() if text}
    if file.config.version in ("v7", "v11", "v13") and {"[SYSTEM_PROMPT]", "[INST]"} <= special.keys():
        settings["chat_template"] = _TEKKEN_TEMPLATE
    return Imported(_by_ranks(tokens, special, file.config.pattern, name), settings)


def tok_json(data: bytes, name: str = "tokenizer.tok.json") -> Imported:
    """Grok 2.5's."""
    file = _decoded(data, _Grok, name)
    if file.pat_str is None and file.word_split != "V1":
        raise TokenizerError(f"{name}: word_split is {shown(file.word_split)}; 'V1' is known.")
    try:
        special = {bytes(token.bytes).decode(): token.token for token in file.special_tokens}
    except UnicodeDecodeError as problem:
        raise TokenizerError(f"{name}: a special token is not UTF-8 ({problem}). {REMEDY}") from None
    tokens = [(bytes(token.bytes), token.token) for token in file.regular_tokens]
    names = {"eos_token": "<|eos|>", "pad_token": "<|pad|>"}
    settings = {key: text for key, text in names.items() if text in special} | {"chat_template": _GROK_TEMPLATE}
    return Imported(_by_ranks(tokens, special, file.pat_str or byte_level.QWEN, name), settings)


def vocabulary_and_merges(vocabulary: bytes, merges: bytes, settings: Mapping[str, Any], kind: object) -> Imported:
    """GPT-2's and Qwen's. ``settings`` is the contents of tokenizer_config.json, ``kind`` the config's model_type.

    Raises:
        TokenizerError: it is neither of the two, or a file is damaged.
    """
    whose = settings.get("tokenizer_class") or kind
    qwen = isinstance(whose, str) and whose.lower().startswith("qwen")
    if not qwen and whose not in ("gpt2", "GPT2Tokenizer", "GPT2TokenizerFast"):
        raise TokenizerError(
            f"vocab.json and merges.txt do not tell how a text is cut into words. Known are GPT-2's and Qwen's; this "
            f"is {shown(whose)}. Take a version of the model with a tokenizer.json."
        )
    ids = _decoded(vocabulary, dict[str, int], "vocab.json")
    try:
        lines = merges.decode("utf-8").split("\n")
    except UnicodeDecodeError as problem:
        raise TokenizerError(f"merges.txt: the file is not UTF-8 ({problem}). {REMEDY}") from None
    pairs = [tuple(line.rstrip("\r").split(" ")) for line in lines if line.strip() and not line.startswith("#version")]
    if wrong := next((pair for pair in pairs if len(pair) != 2), None):
        raise TokenizerError(f"merges.txt: {shown(' '.join(wrong))} is no pair of tokens. {REMEDY}")
    end = "<|endoftext|>"
    special = _added(settings) | ({end: ids[end]} if end in ids else {})
    document = byte_level.document(ids, pairs, special, byte_level.QWEN if qwen else None)  # type: ignore[arg-type]
    document["normalizer"] = {"type": "NFC"} if qwen else None
    names = ("eos_token",) if qwen else ("bos_token", "eos_token", "unk_token")
    return Imported(msgspec.json.encode(document), dict.fromkeys(names, end) if end in special else {})


def _decoded(data: bytes, kind: Any, name: str) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as problem:
        raise TokenizerError(f"{name}: the file is not of its form ({problem}). {REMEDY}") from problem


def _number(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 9:
        raise ValueError(f"{shown(digits)} is no number")
    return int(digits)


def _added(settings: Mapping[str, Any]) -> dict[str, int]:
    """Texts and ids of ``added_tokens_decoder``; what is malformed there is refused where the tokens are added."""
    listed = settings.get("added_tokens_decoder")
    pairs = listed.items() if isinstance(listed, dict) else ()
    return {
        token["content"]: int(index)
        for index, token in pairs
        if index.isdecimal() and len(index) < 10 and isinstance(token, dict) and isinstance(token.get("content"), str)
    }


def _by_ranks(tokens: Iterable[tuple[bytes, int]], special: dict[str, int], pattern: str, name: str) -> bytes:
    """A tokenizer.json from tokens and their ids, whose order is that of their ranks."""
    ids = dict(tokens := list(tokens))
    texts = {byte_level.as_text(token): index for token, index in ids.items()}
    numbers = [*ids.values(), *special.values()]
    if len(ids) < len(tokens) or len(set(numbers)) < len(numbers) or texts.keys() & special.keys():
        raise TokenizerError(f"{name}: a token, or an id, is there twice. {REMEDY}")
    if min(numbers, default=0) < 0 or max(numbers, default=0) >= _MAX_ID:
        raise TokenizerError(f"{name}: a token id is outside 0 to {_MAX_ID - 1}. {REMEDY}")
    if lacking := [byte for byte in range(256) if bytes([byte]) not in ids]:
        raise TokenizerError(f"{name}: the byte {lacking[0]} is no token, so not every text has tokens. {REMEDY}")
    if min(map(len, ids)) == 0 or max(map(len, ids)) > _MAX_TOKEN_BYTES or sum(map(len, ids)) > _MAX_ALL_BYTES:
        raise TokenizerError(
            f"{name}: tokens have 1 to {_MAX_TOKEN_BYTES} bytes, and together at most {_MAX_ALL_BYTES}; here the "
            f"longest has {max(map(len, ids))}, all {sum(map(len, ids))}. {REMEDY}"
        )
    merges: list[tuple[str, str]] = []
    for token in sorted(ids, key=ids.__getitem__):
        cuts = (cut for cut in range(1, len(token)) if token[:cut] in ids and token[cut:] in ids)
        text = byte_level.as_text(token)  # a character for each byte
        merges += [(text[:cut], text[cut:]) for cut in cuts]
    document = byte_level.document(texts, merges, special, pattern)
    document["model"]["ignore_merges"] = True
    return msgspec.json.encode(document)

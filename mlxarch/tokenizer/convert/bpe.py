"""Convert publishers' own byte-level BPE files to the contents of a tokenizer.json.

    tiktoken.model             Kimi; lines of base64 and rank, no special tokens
    tekken.json                Mistral
    tokenizer.tok.json         Grok 2.5
    vocab.json, merges.txt     GPT-2 and Qwen, in folders without a tokenizer.json

The first three list tokens with ranks and no merges. Their encoders merge two neighbours whenever
the concatenation is a token, lowest rank first, and keep a word whole if it is a token. The
equivalent list of merges has every pair of tokens that forms a token, in the order of its rank.
"""

import base64
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import msgspec

from mlxarch.errors import TokenizerError
from mlxarch.system.untrusted_files import REMEDY, short_repr
from mlxarch.tokenizer import byte_level
from mlxarch.tokenizer.added_tokens import listed_ids
from mlxarch.tokenizer.convert.converted import ConvertedTokenizer

MAX_FILE_BYTES = 64 << 20
"""Largest file that is read; the largest published ones have 20 MB."""
_MAX_TOKEN_ID = 1 << 24
_MAX_SPECIAL_TOKENS = 1 << 16
_MAX_TOKEN_BYTES = 512
_MAX_TOTAL_BYTES = 16 << 20  # of all tokens together; published vocabularies have 1.5 MB

# Special tokens of tekken.json files that do not list them (up to version v7), by id.
# Source: SpecialTokens and Tekkenizer of mistral-common.
_TEKKEN_SPECIAL_TOKENS = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
)
# The chat format of Grok 2.5, which the model's files do not specify.
# Source: sglang, with which its publisher serves it.
_GROK_TEMPLATE = (
    "{%- set names = {'user': 'Human: ', 'system': 'System: ', 'assistant': 'Assistant: '} -%}"
    "{%- for message in messages if message['role'] in names -%}"
    "{%- set text = message['content'] -%}"
    "{{- names[message['role']]"
    " + (text if message['role'] == 'assistant' else text.strip()) -}}"
    "{{- '<|separator|>\\n\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"
)
# The chat format of mistral-common from tokenizer version v7 on, without tools.
_TEKKEN_TEMPLATE = (
    "{%- if tools -%}{{- raise_exception('This template knows no tools.') -}}{%- endif -%}"
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    "{{- '[SYSTEM_PROMPT]' + message['content'] + '[/SYSTEM_PROMPT]' -}}"
    "{%- elif message['role'] == 'user' -%}{{- '[INST]' + message['content'] + '[/INST]' -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- message['content'] + eos_token -}}"
    "{%- else -%}{{- raise_exception('The roles are system, user and assistant.') -}}{%- endif -%}"
    "{%- endfor -%}"
)


class _TekkenToken(msgspec.Struct):
    rank: int
    token_bytes: str


class _TekkenSpecialToken(msgspec.Struct):
    rank: int
    token_str: str


class _TekkenConfig(msgspec.Struct):
    pattern: str
    default_vocab_size: int
    default_num_special_tokens: int
    version: str = ""


class _TekkenFile(msgspec.Struct):
    config: _TekkenConfig
    vocab: list[_TekkenToken]
    special_tokens: list[_TekkenSpecialToken] | None = None


class _GrokToken(msgspec.Struct):
    bytes: list[Annotated[int, msgspec.Meta(ge=0, le=255)]]
    token: int


class _GrokFile(msgspec.Struct):
    regular_tokens: list[_GrokToken]
    special_tokens: list[_GrokToken]
    word_split: str
    pat_str: str | None = None


def convert_tiktoken(
    data: bytes, tokenizer_config: Mapping[str, Any], name: str = "tiktoken.model"
) -> ConvertedTokenizer:
    """Convert the tiktoken.model of Kimi.

    Args:
        data: contents of the file.
        tokenizer_config: contents of tokenizer_config.json.
        name: file name for error messages.

    Raises:
        TokenizerError: the file is damaged, or belongs to another model: the format does not hold
            the regular expression that splits a text into words.
    """
    if tokenizer_config.get("tokenizer_class") != "TikTokenTokenizer":
        raise TokenizerError(
            f"{name}: its regular expression is not in the file, and known for tokenizer_class "
            "'TikTokenTokenizer' (Kimi) alone; tokenizer_config.json says "
            f"{short_repr(tokenizer_config.get('tokenizer_class'))}. Take a version of the "
            "model with a tokenizer.json."
        )
    tokens: list[tuple[bytes, int]] = []
    try:
        for line in filter(None, data.splitlines()):
            token, _, rank = line.partition(b" ")
            tokens.append((base64.b64decode(token, validate=True), _parse_integer(rank)))
    except ValueError as problem:
        raise TokenizerError(
            f"{name}: line {len(tokens) + 1} is not base64 and a number ({problem}). {REMEDY}"
        ) from None
    special_tokens = listed_ids(tokenizer_config)
    return ConvertedTokenizer(
        _tokenizer_json_from_ranks(tokens, special_tokens, byte_level.KIMI_PATTERN, name)
    )


def convert_tekken(data: bytes, name: str = "tekken.json") -> ConvertedTokenizer:
    """Convert Mistral's tekken.json.

    Special tokens have the first ids, and the vocabulary is cut to ``default_vocab_size``.

    Raises:
        TokenizerError: the file is damaged.
    """
    file = _decode_json(data, _TekkenFile, name)
    special_count = file.config.default_num_special_tokens
    size = file.config.default_vocab_size - special_count
    if not 0 < size <= len(file.vocab) or not 3 <= special_count <= _MAX_SPECIAL_TOKENS:
        raise TokenizerError(
            f"{name}: {special_count} special tokens in a vocabulary of "
            f"{file.config.default_vocab_size}, with {len(file.vocab)} others listed, cannot be. "
            f"{REMEDY}"
        )
    if file.special_tokens is None:
        texts = dict(enumerate(_TEKKEN_SPECIAL_TOKENS))
    else:
        texts = {token.rank: token.token_str for token in file.special_tokens}
    special_tokens = {texts.get(rank, f"<SPECIAL_{rank}>"): rank for rank in range(special_count)}
    try:
        tokens = [
            (base64.b64decode(token.token_bytes, validate=True), token.rank + special_count)
            for token in file.vocab
            if token.rank < size
        ]
    except ValueError as problem:
        raise TokenizerError(f"{name}: a token is not base64 ({problem}). {REMEDY}") from None
    tokenizer_config: dict[str, Any] = {"add_bos_token": True}
    for key, rank in (("bos_token", 1), ("eos_token", 2), ("unk_token", 0)):
        if text := texts.get(rank):
            tokenizer_config[key] = text
    has_template = {"[SYSTEM_PROMPT]", "[INST]"} <= special_tokens.keys()
    if file.config.version in ("v7", "v11", "v13") and has_template:
        tokenizer_config["chat_template"] = _TEKKEN_TEMPLATE
    return ConvertedTokenizer(
        _tokenizer_json_from_ranks(tokens, special_tokens, file.config.pattern, name),
        tokenizer_config,
    )


def convert_tok_json(data: bytes, name: str = "tokenizer.tok.json") -> ConvertedTokenizer:
    """Convert the tokenizer.tok.json of Grok 2.5.

    Raises:
        TokenizerError: the file is damaged, or names an unknown regular expression.
    """
    file = _decode_json(data, _GrokFile, name)
    if file.pat_str is None and file.word_split != "V1":
        raise TokenizerError(f"{name}: word_split is {short_repr(file.word_split)}; 'V1' is known.")
    try:
        special_tokens = {bytes(token.bytes).decode(): token.token for token in file.special_tokens}
    except UnicodeDecodeError as problem:
        raise TokenizerError(
            f"{name}: a special token is not UTF-8 ({problem}). {REMEDY}"
        ) from None
    tokens = [(bytes(token.bytes), token.token) for token in file.regular_tokens]
    special_names = {"eos_token": "<|eos|>", "pad_token": "<|pad|>"}
    tokenizer_config = {key: text for key, text in special_names.items() if text in special_tokens}
    tokenizer_config["chat_template"] = _GROK_TEMPLATE
    pattern = file.pat_str or byte_level.QWEN_PATTERN
    return ConvertedTokenizer(
        _tokenizer_json_from_ranks(tokens, special_tokens, pattern, name), tokenizer_config
    )


def convert_vocab_and_merges(
    vocab: bytes, merges: bytes, tokenizer_config: Mapping[str, Any], model_type: object
) -> ConvertedTokenizer:
    """Convert vocab.json and merges.txt of GPT-2 or Qwen.

    Args:
        vocab: contents of vocab.json.
        merges: contents of merges.txt.
        tokenizer_config: contents of tokenizer_config.json.
        model_type: ``model_type`` of config.json; counts if there is no ``tokenizer_class``.

    Raises:
        TokenizerError: it is neither of the two, or a file is damaged.
    """
    tokenizer_class = tokenizer_config.get("tokenizer_class") or model_type
    is_qwen = isinstance(tokenizer_class, str) and tokenizer_class.lower().startswith("qwen")
    if not is_qwen and tokenizer_class not in ("gpt2", "GPT2Tokenizer", "GPT2TokenizerFast"):
        raise TokenizerError(
            "vocab.json and merges.txt do not tell how a text is cut into words. Known are GPT-2's "
            f"and Qwen's; this is {short_repr(tokenizer_class)}. Take a version of the model with "
            "a tokenizer.json."
        )
    ids = _decode_json(vocab, dict[str, int], "vocab.json")
    pairs = _parse_merges(merges)
    end = "<|endoftext|>"
    special_tokens = listed_ids(tokenizer_config)
    if end in ids:
        special_tokens[end] = ids[end]
    pattern = byte_level.QWEN_PATTERN if is_qwen else None
    document = byte_level.build_tokenizer_json(ids, pairs, special_tokens, pattern)
    document["normalizer"] = {"type": "NFC"} if is_qwen else None
    names = ("eos_token",) if is_qwen else ("bos_token", "eos_token", "unk_token")
    return ConvertedTokenizer(
        msgspec.json.encode(document), dict.fromkeys(names, end) if end in special_tokens else {}
    )


def _parse_merges(merges: bytes) -> list[tuple[str, str]]:
    try:
        lines = merges.decode("utf-8").split("\n")
    except UnicodeDecodeError as problem:
        raise TokenizerError(f"merges.txt: the file is not UTF-8 ({problem}). {REMEDY}") from None
    pairs: list[tuple[str, str]] = []
    for line in lines:
        if not line.strip() or line.startswith("#version"):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2:
            raise TokenizerError(
                f"merges.txt: {short_repr(' '.join(pair))} is no pair of tokens. {REMEDY}"
            )
        pairs.append((pair[0], pair[1]))
    return pairs


def _decode_json(data: bytes, kind: Any, name: str) -> Any:
    """Decode JSON into ``kind``, a type that msgspec supports."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as problem:
        raise TokenizerError(
            f"{name}: the file is not of its form ({problem}). {REMEDY}"
        ) from problem


def _parse_integer(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 9:
        raise ValueError(f"{short_repr(digits)} is no number")
    return int(digits)


def _tokenizer_json_from_ranks(
    tokens: Iterable[tuple[bytes, int]], special_tokens: dict[str, int], pattern: str, name: str
) -> bytes:
    """Build a tokenizer.json from tokens and their ids, which are ordered by rank."""
    tokens = list(tokens)
    ids = dict(tokens)
    texts = {byte_level.bytes_to_unicode(token): index for token, index in ids.items()}
    all_ids = [*ids.values(), *special_tokens.values()]
    repeated = len(ids) < len(tokens) or len(set(all_ids)) < len(all_ids)
    if repeated or texts.keys() & special_tokens.keys():
        raise TokenizerError(f"{name}: a token, or an id, is there twice. {REMEDY}")
    if min(all_ids, default=0) < 0 or max(all_ids, default=0) >= _MAX_TOKEN_ID:
        raise TokenizerError(f"{name}: a token id is outside 0 to {_MAX_TOKEN_ID - 1}. {REMEDY}")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ids]:
        raise TokenizerError(
            f"{name}: the byte {missing[0]} is no token, so not every text has tokens. {REMEDY}"
        )
    lengths = [len(token) for token in ids]
    if min(lengths) == 0 or max(lengths) > _MAX_TOKEN_BYTES or sum(lengths) > _MAX_TOTAL_BYTES:
        raise TokenizerError(
            f"{name}: tokens have 1 to {_MAX_TOKEN_BYTES} bytes, and together at most "
            f"{_MAX_TOTAL_BYTES}; here the longest has {max(lengths)}, all {sum(lengths)}. {REMEDY}"
        )
    document = byte_level.build_tokenizer_json(texts, _merges(ids), special_tokens, pattern)
    document["model"]["ignore_merges"] = True
    return msgspec.json.encode(document)


def _merges(ids: Mapping[bytes, int]) -> list[tuple[str, str]]:
    """Return every pair of tokens that forms a token, ordered by the id of that token."""
    merges: list[tuple[str, str]] = []
    for token in sorted(ids, key=ids.__getitem__):
        text = byte_level.bytes_to_unicode(token)  # one character per byte
        for cut in range(1, len(token)):
            if token[:cut] in ids and token[cut:] in ids:
                merges.append((text[:cut], text[cut:]))
    return merges

"""Tokens that a model's JSON files add to its vocabulary, and special tokens that they name.

``added_tokens_decoder`` of tokenizer_config.json lists tokens with ids and flags; folders without
it may have the older added_tokens.json, ids alone. Special tokens are named by keys such as
``eos_token``, and in the lists ``additional_special_tokens`` and ``extra_special_tokens``. Tokens
that the tokenizer lacks are added as transformers 5 does: the listed ones in the order of their
ids, then the named ones at the next free ids.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken

from mlxarch.errors import TokenizerError
from mlxarch.system.untrusted_files import short_repr
from mlxarch.tokenizer.load_json import (
    MAX_ADDED_TOKENS,
    MAX_TOKEN_ID,
    check_added_tokens,
    translate_panics,
)

logger = logging.getLogger(__name__)

_STANDARD_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_TAG = re.compile(r"<[^<>\s]+>|\[/?[A-Z][A-Z0-9_/]*\]")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def leading_tag(text: str) -> str | None:
    """Return the tag that a text begins with, such as "<|call|>", "</tool>" or "[INST]"."""
    match = _TAG.match(text)
    return match[0] if match else None


def find_tags(text: str) -> Iterator[tuple[int, str]]:
    """Yield position and text of everything in a text that is spelled as a tag."""
    return ((match.start(), match[0]) for match in _TAG.finditer(text))


def is_tag(text: str) -> bool:
    """Whether a token is spelled as a tag, as control tokens are."""
    return leading_tag(text) == text


def named_special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, AddedToken]:
    """Return name -> special token: ``bos_token`` and so on, then names of the model's own.

    A key that ends in ``_token`` names a special token, and so does a key of the object
    ``extra_special_tokens``.
    """
    own = [
        name
        for name, value in tokenizer_config.items()
        if name.endswith("_token") and not isinstance(value, bool)
    ]
    names = dict.fromkeys([*(f"{name}_token" for name in _STANDARD_NAMES), *own])
    found = {name: _special_token(tokenizer_config.get(name)) for name in names}
    extra = tokenizer_config.get("extra_special_tokens")
    if isinstance(extra, dict):
        found |= {name: _special_token(value) for name, value in extra.items()}
    return {name: token for name, token in found.items() if token is not None}


def special_tokens(tokenizer_config: Mapping[str, Any]) -> list[AddedToken]:
    """Return all special tokens that the config names, with or without a name of their own."""
    found = list(named_special_tokens(tokenizer_config).values())
    for key in ("additional_special_tokens", "extra_special_tokens"):
        values = tokenizer_config.get(key)
        if isinstance(values, list):
            found += filter(None, map(_special_token, values))
    return list({token.content: token for token in reversed(found)}.values())[::-1]


def as_added_tokens_decoder(
    ids: Mapping[str, Any], tokenizer_config: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return added_tokens.json in the form of ``added_tokens_decoder``.

    Args:
        ids: contents of added_tokens.json, token -> id.
        tokenizer_config: names the special tokens.
    """
    special = {token.content for token in special_tokens(tokenizer_config)}
    return {
        str(index): {
            "content": text,
            "special": text in special,
            "normalized": text not in special,
        }
        for text, index in ids.items()
    }


def listed_ids(tokenizer_config: Mapping[str, Any]) -> dict[str, int]:
    """Return token -> id of ``added_tokens_decoder``.

    Malformed entries are skipped; ``add_tokens`` rejects them.
    """
    listed = tokenizer_config.get("added_tokens_decoder")
    ids: dict[str, int] = {}
    for index, token in listed.items() if isinstance(listed, dict) else ():
        if not index.isdecimal() or int(index[:9]) >= MAX_TOKEN_ID or len(index) > 9:
            continue
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            ids[token["content"]] = int(index)
    return ids


def add_tokens(
    tokenizer: tokenizers.Tokenizer, tokenizer_config: Mapping[str, Any], id_limit: int = 0
) -> dict[int, AddedToken]:
    """Add the tokens that tokenizer_config.json lists or names and the tokenizer lacks.

    Args:
        tokenizer: extended in place.
        tokenizer_config: contents of tokenizer_config.json.
        id_limit: rows of the model's embedding; 0 if unknown. A named token that would get a larger
            id is left out.

    Returns:
        Id -> token of all added tokens that the tokenizer now has.

    Raises:
        TokenizerError: ``added_tokens_decoder`` is malformed, or the library fails on it.
    """
    named = special_tokens(tokenizer_config)
    wanted = _parse_listed(tokenizer_config.get("added_tokens_decoder") or {})
    with translate_panics("adding the tokens of tokenizer_config.json"):
        present = tokenizer.get_added_tokens_decoder()
        check_added_tokens(
            [token.content for token in (*present.values(), *wanted.values())],
            "tokenizer_config.json",
        )
        missing: list[AddedToken] = []
        for index, token in sorted(wanted.items()):
            known = tokenizer.token_to_id(token.content)
            if known is None or (known == index and repr(present.get(index)) != repr(token)):
                missing.append(token)
        tokenizer.add_tokens(missing)  # at once: each call builds the search for all of them anew
        for index, token in wanted.items():
            if (known := tokenizer.token_to_id(token.content)) != index:
                logger.warning(
                    "%s has the id %s, and not %s as its config says",
                    short_repr(token.content),
                    known,
                    index,
                )
        _add_named(tokenizer, named, id_limit)
        return tokenizer.get_added_tokens_decoder()


def _add_named(tokenizer: tokenizers.Tokenizer, named: Iterable[AddedToken], id_limit: int) -> None:
    """Add the special tokens that are not among the added tokens, as far as there are ids."""
    present = tokenizer.get_added_tokens_decoder()
    texts = {token.content for token in present.values()}
    next_id = max([tokenizer.get_vocab_size(with_added_tokens=False), *(i + 1 for i in present)])
    missing: list[AddedToken] = []
    for token in named:
        if token.content in texts:
            continue
        if tokenizer.token_to_id(token.content) is None:
            if (id_limit and next_id >= id_limit) or tokenizer.id_to_token(next_id) is not None:
                logger.warning(
                    "the special token %s is not in the vocabulary, and there is no id left for it",
                    short_repr(token.content),
                )
                continue
            next_id += 1
        missing.append(token)
    tokenizer.add_tokens(missing)


def _parse_listed(listed: Any) -> dict[int, AddedToken]:
    if not isinstance(listed, dict) or len(listed) > MAX_ADDED_TOKENS:
        raise TokenizerError(
            "tokenizer_config.json: added_tokens_decoder is no object of at most "
            f"{MAX_ADDED_TOKENS} token ids to tokens."
        )
    try:
        return {int(index): _parse_added_token(fields) for index, fields in listed.items()}
    except (TypeError, ValueError, KeyError, AttributeError) as problem:
        raise TokenizerError(
            f"tokenizer_config.json: added_tokens_decoder is not understood ({problem!r})."
        ) from problem


def _parse_added_token(fields: dict[str, Any]) -> AddedToken:
    flags = {name: fields[name] for name in _FLAGS if name in fields}
    valid = isinstance(fields["content"], str) and all(
        isinstance(flag, bool) for flag in flags.values()
    )
    if not valid:
        raise ValueError(fields)
    return AddedToken(fields["content"], **flags)


def _special_token(value: Any) -> AddedToken | None:
    """Return a special token given as a text or an object; None if it is neither, or empty."""
    if isinstance(value, str) and value:
        return AddedToken(value, special=True)
    if not isinstance(value, dict):
        return None
    try:
        return _parse_added_token({**value, "special": True}) if value["content"] else None
    except (TypeError, ValueError, KeyError, AttributeError):
        return None

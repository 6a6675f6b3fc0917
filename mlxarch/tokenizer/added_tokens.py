"""Add the tokens of tokenizer_config.json to a tokenizer that lacks them.

Some models list tokens under ``added_tokens_decoder`` that their tokenizer.json does not have.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken

from mlxarch.errors import TokenizerError
from mlxarch.system.untrusted_files import short_repr
from mlxarch.tokenizer.load_json import translate_panics

logger = logging.getLogger(__name__)

_MAX_ADDED_TOKENS = 1 << 17
_TAG = re.compile(r"<[^<>\s]+>|\[[A-Z_/]+\]")


def add_listed_tokens(
    tokenizer: tokenizers.Tokenizer,
    tokenizer_config: Mapping[str, Any],
    special_tokens: Iterable[str],
) -> dict[int, AddedToken]:
    """Add the missing tokens of tokenizer_config.json, in the order of their ids.

    Args:
        tokenizer: extended in place.
        tokenizer_config: contents of tokenizer_config.json.
        special_tokens: texts of BOS, EOS and so on, to be marked as special.

    Returns:
        Id -> token of all added tokens that the tokenizer now has.

    Raises:
        TokenizerError: ``added_tokens_decoder`` is malformed, or the library fails on it.
    """
    listed = tokenizer_config.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict) or len(listed) > _MAX_ADDED_TOKENS:
        raise TokenizerError(
            "tokenizer_config.json: added_tokens_decoder is no object of token ids to tokens."
        )
    try:
        wanted = {int(index): _parse_added_token(fields) for index, fields in listed.items()}
    except (TypeError, ValueError, KeyError, AttributeError) as problem:
        raise TokenizerError(
            f"tokenizer_config.json: added_tokens_decoder is not understood ({problem!r})."
        ) from problem
    with translate_panics("adding the tokens of tokenizer_config.json"):
        present = tokenizer.get_added_tokens_decoder()
        for index, token in sorted(wanted.items()):
            known = tokenizer.token_to_id(token.content)
            if known is None or (known == index and repr(present.get(index)) != repr(token)):
                tokenizer.add_tokens([token])
                known = tokenizer.token_to_id(token.content)
            if known != index:
                logger.warning(
                    "%s has the id %s, and not %s as its config says",
                    short_repr(token.content),
                    known,
                    index,
                )
        for text in special_tokens:
            if tokenizer.token_to_id(text) not in {None, *wanted, *present}:
                tokenizer.add_special_tokens([text])
        return tokenizer.get_added_tokens_decoder()


def is_tag(text: str) -> bool:
    """Whether a token is spelled as a tag, such as "<|call|>", "</tool>" or "[INST]"."""
    return _TAG.fullmatch(text) is not None


def _parse_added_token(fields: dict[str, Any]) -> AddedToken:
    flags = {
        name: fields[name]
        for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
        if name in fields
    }
    valid = isinstance(fields["content"], str) and all(
        isinstance(flag, bool) for flag in flags.values()
    )
    if not valid:
        raise ValueError(fields)
    return AddedToken(fields["content"], **flags)

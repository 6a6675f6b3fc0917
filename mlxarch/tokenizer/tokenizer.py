"""Tokenizer of a model's folder: text to token ids and back.

The tokenizer is read from tokenizer.json, or else from one of the formats of the folder
``convert``; special tokens from tokenizer_config.json, special_tokens_map.json and
added_tokens.json; end tokens from all config files and from the chat template. docs/tokenizers.md
lists every key. Nothing in the folder is executed, and every file is validated before a library
parses it.

Decoding inverts encoding: ``clean_up_tokenization_spaces``, which would alter the text, is ignored.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, SupportsIndex, overload

from mlxarch.errors import ChatTemplateError, InvalidInput, TokenizerError
from mlxarch.system.untrusted_files import short_repr
from mlxarch.tokenizer.added_tokens import add_tokens, is_tag, named_special_tokens
from mlxarch.tokenizer.chat_template import (
    ChatTemplate,
    choose_template,
    find_templates,
    template_variables,
)
from mlxarch.tokenizer.control_tokens import MessageMarker
from mlxarch.tokenizer.detokenizer import StreamingDetokenizer, TokenByteDecoder
from mlxarch.tokenizer.encoder import Encoder
from mlxarch.tokenizer.end_of_turn import end_of_turn_tokens
from mlxarch.tokenizer.load_folder import (
    load_from_folder,
    read_json_if_present,
    read_tokenizer_config,
)
from mlxarch.tokenizer.load_json import MAX_TOKEN_ID, LoadedTokenizer, translate_panics

logger = logging.getLogger(__name__)


class Tokenizer:
    """The tokenizer of one model.

    Attributes:
        vocab_size: 1 + the largest id that ``encode`` can return.
        bos_id: id of the beginning-of-sequence token; None for a model without one.
        bos_token: the same token as text.
        eos_token: the end-of-sequence token; a model may stop at several, see ``eos_ids``.
        has_chat_template: whether ``apply_chat_template`` works.
    """

    def __init__(
        self,
        loaded: LoadedTokenizer,
        *,
        settings: Mapping[str, Any] | None = None,
        templates: Mapping[str, str] | None = None,
        end_ids: Sequence[int] = (),
        older_end_ids: Sequence[int] = (),
        id_limit: int = 0,
    ):
        """Build a tokenizer from a loaded tokenizer.json; most callers want ``from_folder``.

        Args:
            loaded: the result of ``load_tokenizer_json``.
            settings: contents of tokenizer_config.json.
            templates: chat templates, name -> Jinja source.
            end_ids: end tokens that other config files name.
            older_end_ids: end tokens of config.json where generation_config.json names others. They
                count if they are added tokens: ids of before a finetune may be ordinary words.
            id_limit: number of rows of the model's embedding, if larger than ``vocab_size``; the
                ids in between are valid and decode to no text.
        """
        self._tokenizer = loaded.tokenizer
        self._max_text_bytes = loaded.max_text_bytes
        self._tokenizer_config = dict(settings or {})
        self._templates = dict(templates or {})
        self._token_bytes = TokenByteDecoder(loaded.decoder)
        self._token_texts: dict[int, str | None] = {}
        self._chat_templates: dict[str, ChatTemplate] = {}
        self._special_tokens = {
            name: token.content
            for name, token in named_special_tokens(self._tokenizer_config).items()
        }
        added = add_tokens(self._tokenizer, self._tokenizer_config, id_limit)
        self.vocab_size = max([loaded.vocab_size, *(index + 1 for index in added)])
        self._id_limit = max(self.vocab_size, id_limit)
        self._added_ids = frozenset(added)
        self._special_ids = frozenset(index for index, token in added.items() if token.special)
        self._config_end_ids = {*end_ids, *self._added_ids.intersection(older_end_ids)}
        self.bos_token = self._special_tokens.get("bos_token")
        self.eos_token = self._special_tokens.get("eos_token")
        self.bos_id = self._optional_token_id(self.bos_token)
        self.has_chat_template = bool(self._templates)

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the template for a conversation without tools; None if there is none."""
        return choose_template(self._templates, None)

    @property
    def tool_template(self) -> str | None:
        """Jinja source of the template for a conversation with tools; None if there is none."""
        return choose_template(self._templates, [])

    @property
    def tool_variables(self) -> frozenset[str]:
        """Variables that the template for a conversation with tools reads."""
        return template_variables(self.tool_template or "")

    @property
    def template_variables(self) -> frozenset[str]:
        """Variables that the chat template reads, such as ``messages`` or ``enable_thinking``."""
        return template_variables(self.chat_template or "")

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> "Tokenizer":
        """Load the tokenizer of a model's folder.

        Raises:
            TokenizerError: there is no tokenizer, or a file is damaged, exceeds a limit, or is of
                an unknown kind.
        """
        folder = Path(folder)
        tokenizer_config = read_tokenizer_config(folder)
        config = read_json_if_present(folder, "config.json")
        text_config = config.get("text_config")
        configs = [config, text_config if isinstance(text_config, dict) else {}]
        generation_config = read_json_if_present(folder, "generation_config.json")
        vocab_sizes = [size for each in configs if isinstance(size := each.get("vocab_size"), int)]
        loaded, tokenizer_config = load_from_folder(
            folder, tokenizer_config, config.get("model_type")
        )
        end_ids = _as_id_list(generation_config.get("eos_token_id"))
        older_end_ids = [
            index for each in configs for index in _as_id_list(each.get("eos_token_id"))
        ]
        return cls(
            loaded,
            settings=tokenizer_config,
            templates=find_templates(folder, tokenizer_config),
            end_ids=end_ids or older_end_ids,
            older_end_ids=older_end_ids,
            id_limit=min(max(vocab_sizes, default=0), MAX_TOKEN_ID),
        )

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Ids of all tokens that end an answer.

        They come from the config files, the tokenizer's EOS token, and the end of a turn in the
        chat template.
        """
        found = set(self._config_end_ids)
        special = {self._token_text(index) or "" for index in self._special_ids}
        ends = end_of_turn_tokens(self._render_answered, self._optional_token_id, special)
        for text in (self.eos_token, *ends):
            index = self._optional_token_id(text)
            if index is not None:
                found.add(index)
        known = {index for index in found if 0 <= index < self._id_limit}
        if known != found:
            logger.warning("end tokens %s do not exist and are ignored", sorted(found - known))
        return frozenset(known)

    @cached_property
    def _hidden_ids(self) -> frozenset[int]:
        """Ids that ``decode`` skips: special tokens, and added tokens that end an answer."""
        return self._special_ids | (self.eos_ids & self._added_ids)

    def _render_answered(self, messages: list[dict[str, str]]) -> str:
        """Render a conversation that ends with an answer."""
        return self.apply_chat_template(messages, add_generation_prompt=False, tokenize=False)

    def token_id(self, token: str) -> int | None:
        """Return the id of a token given as text, such as "<|im_end|>"; None if there is none."""
        return self._optional_token_id(token)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token in the vocabulary's spelling -> id, added tokens included."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids of special tokens, and of added tokens that are spelled as tags, such as "<tool>"."""
        tags = (index for index in self._added_ids if is_tag(self._token_text(index) or ""))
        return self._special_ids.union(tags)

    def vocabulary_bytes(self) -> dict[int, bytes]:
        """Return the bytes of each token inside a text.

        Raises:
            TokenizerError: single tokens of this tokenizer have no bytes of their own.
        """
        if not self._token_bytes.streamable:
            raise TokenizerError(
                "The tokenizer's decoder is of an unknown kind, so the bytes of a token are not "
                "known; answers of this model cannot be constrained."
            )
        return {
            index: self._token_bytes(text, first=False, added=index in self._added_ids)
            for text, index in self.vocabulary.items()
        }

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of a token inside a text; they may be a part of a character."""
        if not self._token_bytes.streamable:
            return self.decode([token], skip_special_tokens=False).encode()
        text = self._token_text(token) or ""
        return self._token_bytes(text, first=False, added=token in self._added_ids)

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Convert a text to token ids.

        Args:
            text: the text, of at most ``encoder.MAX_TEXT_BYTES`` bytes in UTF-8.
            add_special_tokens: prepend BOS (and append EOS) for models that want it. Not for text
                from a chat template, which contains these tokens already.
            parse_special: control tokens that are spelled out in the text become their ids. False
                for text of unknown origin: it is encoded as text throughout.

        Raises:
            InvalidInput: ``text`` is not a str.
            TokenizerError: it is too long, contains a lone surrogate, or the library fails on it.
        """
        return self._encoder.encode(
            text, add_special_tokens=add_special_tokens, parse_special=parse_special
        )

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Convert token ids to text; equal to the concatenated output of ``detokenizer``.

        Raises:
            InvalidInput: an id is outside the vocabulary.
        """
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return "".join([*map(detokenizer.add, tokens), detokenizer.finish()])

    def detokenizer(
        self, *, skip_special_tokens: bool = True, after: Sequence[int] = ()
    ) -> StreamingDetokenizer:
        """Create an incremental decoder for a stream of tokens.

        Args:
            skip_special_tokens: leave out special tokens and tokens that end an answer.
            after: tokens that the stream continues. The text is then what they lack of the decoded
                whole: a blank in front of the first word stays, unless nothing comes before it.
        """
        hidden = self._hidden_ids if skip_special_tokens else frozenset[int]()

        def token_text(token: int) -> str | None:
            text = self._token_text(token)
            return None if token in hidden else text

        def decode_all(tokens: Sequence[int]) -> str:
            shown = [token for token in tokens if token not in hidden]
            with translate_panics("decoding the tokens"):
                return self._tokenizer.decode(shown, skip_special_tokens=False)

        return StreamingDetokenizer(
            token_text, self._token_bytes, decode_all, added=self._added_ids, after=after
        )

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tokenize: Literal[True] = True,
        parse_special: bool = False,
        **variables: Any,
    ) -> list[int]: ...
    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tokenize: Literal[False],
        parse_special: bool = False,
        **variables: Any,
    ) -> str: ...
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tokenize: bool = True,
        parse_special: bool = False,
        **variables: Any,
    ) -> list[int] | str:
        """Format a conversation as a prompt: token ids, or text with ``tokenize=False``.

        Args:
            messages: mappings with "role" and "content".
            add_generation_prompt: end with the tokens that introduce the model's answer.
            tools: JSON schemas of functions; the model's own template for tools is used if it has
                one.
            tokenize: return ids. The template contains BOS, so none is added.
            parse_special: control tokens that messages spell, such as "<|im_end|>", become tokens.
                By default they stay text, and only the template writes control tokens.
            variables: further variables of the template, such as ``enable_thinking``.

        Raises:
            InvalidInput: an argument has the wrong form, or a variable has a reserved name.
            ChatTemplateError: the model has no template, or its template rejects the messages or
                exceeds a limit.
        """
        source = choose_template(self._templates, tools)
        if source is None:
            raise ChatTemplateError(
                "The model has no chat template for this (it has: "
                f"{', '.join(self._templates) or 'none'}). Give it a text to complete, or take the "
                "model's instruct or chat version."
            )
        template = self._chat_templates.setdefault(
            source, ChatTemplate(source, self._special_tokens)
        )
        text = template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            variables=variables,
            marker=self._message_marker if tokenize and not parse_special else None,
        )
        if not tokenize:
            return text
        if parse_special:
            return self.encode(text, add_special_tokens=False)
        return self._encoder.encode_marked(text)

    @cached_property
    def _message_marker(self) -> MessageMarker:
        return MessageMarker(*self._control_texts, self._encoder.normalize)

    @property
    def _control_texts(self) -> tuple[list[str], list[str]]:
        """Texts of the special tokens, and of other added tokens that are spelled as tags."""
        special = [self._token_text(index) or "" for index in self._special_ids]
        tags = [self._token_text(index) or "" for index in self.control_ids - self._special_ids]
        return special, tags

    @cached_property
    def _encoder(self) -> Encoder:
        special, tags = self._control_texts
        prefix, suffix = self._prefix_and_suffix()
        return Encoder(self._tokenizer, self._max_text_bytes, [*special, *tags], prefix, suffix)

    def _prefix_and_suffix(self) -> tuple[list[int] | None, list[int]]:
        """Ids to put before and after a text as tokenizer_config.json says.

        (None, []) if it says nothing: then the post-processor of tokenizer.json applies.
        """
        config = self._tokenizer_config
        if "add_bos_token" not in config and "add_eos_token" not in config:
            return None, []
        eos_id = self._optional_token_id(self.eos_token)
        prefix = [self.bos_id] if config.get("add_bos_token") and self.bos_id is not None else []
        suffix = [eos_id] if config.get("add_eos_token") and eos_id is not None else []
        return prefix, suffix

    def _optional_token_id(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(token)

    def _token_text(self, token: int) -> str | None:
        """Return a token in the vocabulary's spelling; None for an id that has no token.

        Raises:
            InvalidInput: not an id of this model.
        """
        if type(token) is int and token in self._token_texts:
            return self._token_texts[token]
        if (
            isinstance(token, bool)
            or not isinstance(token, SupportsIndex)
            or not 0 <= int(token) < self._id_limit
        ):
            raise InvalidInput(
                f"{short_repr(token)} is no token id: those of this model run from 0 to "
                f"{self._id_limit - 1}."
            )
        with translate_panics("decoding a token"):
            text = self._tokenizer.id_to_token(int(token))
            return self._token_texts.setdefault(int(token), text)


def _as_id_list(value: Any) -> list[int]:
    """Return the integers of an ``eos_token_id``, which may be one or a list."""
    values = value if isinstance(value, list) else [value]
    return [index for index in values if isinstance(index, int) and not isinstance(index, bool)]

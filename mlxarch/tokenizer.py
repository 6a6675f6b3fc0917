"""Text ↔ token ids, for a model's folder.

A tokenizer is read from tokenizer.json, or, where there is none, from a SentencePiece tokenizer.model or one of the
files of ``tokenizer_import``; special tokens from tokenizer_config.json and special_tokens_map.json; end tokens from
all files that name some, and from the chat template. Nothing in the folder is executed, and every file is checked
before a library reads it.

What decodes is exactly what was encoded: ``clean_up_tokenization_spaces`` is not done, which would change it.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, SupportsIndex, overload

from tokenizers import AddedToken

from mlxarch import sentencepiece_import, tokenizer_import, tokenizer_json
from mlxarch.chat_template import ChatTemplate, choose_template, find_templates, template_variables
from mlxarch.detokenizer import StreamingDetokenizer, TokenBytes
from mlxarch.errors import ChatTemplateError, InvalidInput, TokenizerError
from mlxarch.tokenizer_json import LoadedTokenizer, panics_are_errors
from mlxarch.untrusted import child, open_regular, read_exactly, read_json, shown

logger = logging.getLogger(__name__)

MAX_TEXT_BYTES = 16 << 20
"""Of a text to encode, in UTF-8: some four million tokens, more than any context holds."""
MAX_NORMALIZED_BYTES = 256 << 20
"""Of the same text as normalization may lengthen it."""

_SPECIAL_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_MAX_ADDED_TOKENS = 1 << 17
# What ends a turn where the template does not show it. "<|end|>" is not here: gpt-oss ends its thoughts with it.
_END_OF_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<end_of_turn>",
    "<|end_of_turn|>",
    "<turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|return|>",
)
_TOOL_CALL_ENDS = {"<|return|>": "<|call|>", "<|eot_id|>": "<|eom_id|>"}


class Tokenizer:
    """The tokenizer of one model.

    Attributes:
        vocab_size: 1 + the largest id that ``encode`` can give.
        bos_id: the token that starts a text; None for a model without one.
        bos_token: the same as text.
        eos_token: the token that ends a text; a model may stop at several, see ``eos_ids``.
        has_chat_template: whether ``apply_chat_template`` works.
    """

    def __init__(
        self,
        loaded: LoadedTokenizer,
        *,
        settings: Mapping[str, Any] | None = None,
        templates: Mapping[str, str] | None = None,
        end_ids: Sequence[int] = (),
        id_limit: int = 0,
    ):
        """From a loaded tokenizer.json; most callers want ``from_folder``.

        Args:
            loaded: see ``tokenizer_json.load``.
            settings: the contents of tokenizer_config.json.
            templates: name → Jinja text.
            end_ids: end tokens that other files name.
            id_limit: rows of the model's embedding, where that is more than the tokenizer has tokens; ids from there
                stand for no text, and decode to none.
        """
        self._tokenizer = loaded.tokenizer
        self._expansion = loaded.expansion
        self._settings = dict(settings or {})
        self._templates = dict(templates or {})
        self._end_ids = tuple(end_ids)
        self._token_bytes = TokenBytes(loaded.decoder)
        self._texts: dict[int, str | None] = {}
        self._compiled: dict[str, ChatTemplate] = {}
        self._special_tokens = {
            name: text for name in _SPECIAL_TOKENS if (text := _token_text(self._settings.get(name))) is not None
        }
        added = self._add_tokens()
        self.vocab_size = max([loaded.vocab_size, *(index + 1 for index in added)])
        self._id_limit = max(self.vocab_size, id_limit)
        self._special_ids = frozenset(index for index, token in added.items() if token.special)
        self.bos_token = self._special_tokens.get("bos_token")
        self.eos_token = self._special_tokens.get("eos_token")
        self.bos_id = self._id(self.bos_token)
        self.has_chat_template = bool(self._templates)

    @property
    def chat_template(self) -> str | None:
        """The Jinja text for a conversation without tools; None where there is none."""
        return choose_template(self._templates, None)

    @property
    def template_variables(self) -> frozenset[str]:
        """Names that the chat template reads and does not make, such as ``messages`` or ``enable_thinking``."""
        return template_variables(self.chat_template or "")

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> "Tokenizer":
        """The tokenizer in a model's folder.

        Raises:
            TokenizerError: there is none, a file is damaged, breaks a limit, or is of an unknown kind.
        """
        folder = Path(folder)
        settings = _read(folder, "tokenizer_config.json")
        for name, value in _read(folder, "special_tokens_map.json").items():
            settings.setdefault(name, value)
        config = _read(folder, "config.json")
        text_config = config.get("text_config")
        configs = [
            config,
            text_config if isinstance(text_config, dict) else {},
            _read(folder, "generation_config.json"),
        ]
        rows = [value for part in configs if isinstance(value := part.get("vocab_size"), int)]
        loaded, defaults = _load(folder, settings, config.get("model_type"))
        settings = {**defaults, **settings}
        return cls(
            loaded,
            settings=settings,
            templates=find_templates(folder, settings),
            end_ids=[index for part in configs for index in _ids(part.get("eos_token_id"))],
            id_limit=min(max(rows, default=0), tokenizer_json.MAX_TOKEN_ID),
        )

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends an answer: of all configs, of the tokenizer, and the chat template's end of turn."""
        found = set(self._end_ids)
        texts = [self.eos_token, *self._turn_ends()]
        found.update(index for text in texts if (index := self._id(text)) is not None)
        known = {index for index in found if 0 <= index < self._id_limit}
        if known != found:
            logger.warning("end tokens %s do not exist and are ignored", sorted(found - known))
        return frozenset(known)

    def token_id(self, token: str) -> int | None:
        """The id of a token given as text, such as "<|im_end|>"; None where there is none."""
        return self._id(token)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token, as the vocabulary spells it -> id."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Special tokens that stand in the text as text become their tokens. ``add_special_tokens`` puts the token that
        starts a text in front, for models that have one; chat templates write it themselves.

        Raises:
            InvalidInput: ``text`` is no str.
            TokenizerError: it is longer than MAX_TEXT_BYTES, holds a lone surrogate, or the tokenizer fails on it.
        """
        if not isinstance(text, str):
            raise InvalidInput(f"a {type(text).__name__} cannot be encoded; a text (str) can.")
        try:
            size = len(text) if text.isascii() else len(text.encode())
        except UnicodeEncodeError as problem:
            raise TokenizerError(
                f"The text holds half of a surrogate pair (U+{ord(text[problem.start]):04X}) at character "
                f"{problem.start}, which is no character. Decode the text from its bytes again."
            ) from problem
        limit = min(MAX_TEXT_BYTES, MAX_NORMALIZED_BYTES // self._expansion)
        if size > limit:
            raise TokenizerError(f"The text has {size} bytes in UTF-8; at most {limit} are tokenized. Shorten it.")
        prefix, suffix = self._ends
        by_library = add_special_tokens and prefix is None
        with panics_are_errors("tokenizing the text"):
            ids = self._tokenizer.encode(text, add_special_tokens=by_library).ids
        return [*(prefix or ()), *ids, *suffix] if add_special_tokens and prefix is not None else ids

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of tokens, as ``detokenizer`` gives it piece by piece.

        Raises:
            InvalidInput: an id is outside the vocabulary.
        """
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return "".join([*map(detokenizer.add, tokens), detokenizer.finish()])

    def detokenizer(self, *, skip_special_tokens: bool = True) -> StreamingDetokenizer:
        """A fresh decoder for a stream of tokens."""

        def text(token: int) -> str | None:
            shown_text = self._text(token)
            return None if skip_special_tokens and token in self._special_ids else shown_text

        def decode_all(tokens: Sequence[int]) -> str:
            with panics_are_errors("decoding the tokens"):
                return self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)

        return StreamingDetokenizer(text, self._token_bytes, decode_all)

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tokenize: Literal[True] = True,
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
        **variables: Any,
    ) -> str: ...
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tokenize: bool = True,
        **variables: Any,
    ) -> list[int] | str:
        """The prompt for a conversation, as token ids, or as text with ``tokenize=False``.

        Args:
            messages: mappings with "role" and "content".
            add_generation_prompt: end with what introduces the model's answer.
            tools: JSON schemas of functions; the model's template for tools is taken where it has one of its own.
            tokenize: give ids. The template writes the starting token itself, so none is added.
            variables: further variables of the template, such as ``enable_thinking``.

        Raises:
            InvalidInput: an argument is not of that form, or a variable has a reserved name.
            ChatTemplateError: the model has no template, or its template refuses the messages or exceeds a limit.
        """
        source = choose_template(self._templates, tools)
        if source is None:
            raise ChatTemplateError(
                f"The model has no chat template for this (it has: {', '.join(self._templates) or 'none'}). Give it a "
                "text to complete, or take the model's instruct or chat version."
            )
        template = self._compiled.setdefault(source, ChatTemplate(source, self._special_tokens))
        text = template.render(messages, add_generation_prompt=add_generation_prompt, tools=tools, variables=variables)
        return self.encode(text, add_special_tokens=False) if tokenize else text

    @cached_property
    def _ends(self) -> tuple[list[int] | None, list[int]]:
        """Tokens around a text where tokenizer_config.json says so; (None, []): tokenizer.json says it."""
        if "add_bos_token" not in self._settings and "add_eos_token" not in self._settings:
            return None, []
        bos = [self.bos_id] if self._settings.get("add_bos_token") and self.bos_id is not None else []
        eos_id = self._id(self.eos_token)
        return bos, [eos_id] if self._settings.get("add_eos_token") and eos_id is not None else []

    def _add_tokens(self) -> dict[int, AddedToken]:
        """Add the tokens that only tokenizer_config.json names; gives all added ones."""
        listed = self._settings.get("added_tokens_decoder") or {}
        if not isinstance(listed, dict) or len(listed) > _MAX_ADDED_TOKENS:
            raise TokenizerError("tokenizer_config.json: added_tokens_decoder is no object of token ids to tokens.")
        try:
            wanted = {int(index): _added_token(fields) for index, fields in listed.items()}
        except (TypeError, ValueError, KeyError, AttributeError) as problem:
            raise TokenizerError(
                f"tokenizer_config.json: added_tokens_decoder is not understood ({problem!r})."
            ) from problem
        with panics_are_errors("adding the tokens of tokenizer_config.json"):
            present = self._tokenizer.get_added_tokens_decoder()
            for index, token in sorted(wanted.items()):
                known = self._tokenizer.token_to_id(token.content)
                if known is None or (known == index and repr(present.get(index)) != repr(token)):
                    self._tokenizer.add_tokens([token])
                    known = self._tokenizer.token_to_id(token.content)
                if known != index:
                    logger.warning(
                        "%s has the id %s, and not %s as its config says", shown(token.content), known, index
                    )
            for text in self._special_tokens.values():
                if self._tokenizer.token_to_id(text) not in {None, *wanted, *present}:
                    self._tokenizer.add_special_tokens([text])
            return self._tokenizer.get_added_tokens_decoder()

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(token)

    def _text(self, token: int) -> str | None:
        if type(token) is int and token in self._texts:
            return self._texts[token]
        if isinstance(token, bool) or not isinstance(token, SupportsIndex) or not 0 <= int(token) < self._id_limit:
            raise InvalidInput(
                f"{shown(token)} is no token id: those of this model run from 0 to {self._id_limit - 1}."
            )
        with panics_are_errors("decoding a token"):
            return self._texts.setdefault(int(token), self._tokenizer.id_to_token(int(token)))

    def _turn_ends(self) -> list[str]:
        """The special token that the template puts after an answer, or known ones where it shows none."""
        mark = "0987654321"
        ends: list[str] = []
        try:
            text = self.apply_chat_template(
                [{"role": "user", "content": "1"}, {"role": "assistant", "content": mark}],
                add_generation_prompt=False,
                tokenize=False,
            )
            after = text.rpartition(mark)[2].lstrip()
            special = {self._text(index) or "" for index in self._special_ids}
            special -= {"<|end|>"} if "<|channel|>" in special else set()  # there it ends a message, not the answer
            ends = sorted((token for token in special if token and after.startswith(token)), key=len)[-1:]
        except TokenizerError as problem:
            logger.debug("the chat template does not show the end of a turn: %s", problem)
        if not ends:
            ends = [token for token in _END_OF_TURN if self._id(token) in self._special_ids]
        return ends + [_TOOL_CALL_ENDS[token] for token in ends if token in _TOOL_CALL_ENDS]


def _load(folder: Path, settings: Mapping[str, Any], kind: object) -> tuple[LoadedTokenizer, dict[str, Any]]:
    """The tokenizer, and what its file says that tokenizer_config.json may leave out."""

    def found(name: str) -> bool:
        return os.path.lexists(folder / name)

    if found(name := "tokenizer.json"):
        data = _bytes(folder, name, tokenizer_json.MAX_FILE_BYTES)
        return tokenizer_json.load(data, str(folder / name)), {}
    if found(name := "tokenizer.model"):
        data = _bytes(folder, name, sentencepiece_import.MAX_FILE_BYTES)
        converted, special_tokens = sentencepiece_import.tokenizer_json(data, str(folder / name))
        return tokenizer_json.load(converted, str(folder / name)), dict(special_tokens)
    limit = tokenizer_import.MAX_FILE_BYTES
    if found(name := "tekken.json"):
        imported = tokenizer_import.tekken(_bytes(folder, name, limit), str(folder / name))
    elif found(name := "tiktoken.model"):
        imported = tokenizer_import.tiktoken(_bytes(folder, name, limit), settings, str(folder / name))
    elif found(name := "tokenizer.tok.json"):
        imported = tokenizer_import.tok_json(_bytes(folder, name, limit), str(folder / name))
    elif found(name := "vocab.json") and found("merges.txt"):
        merges = _bytes(folder, "merges.txt", limit)
        imported = tokenizer_import.vocabulary_and_merges(_bytes(folder, name, limit), merges, settings, kind)
    else:
        raise TokenizerError(
            f"{folder}: there is no tokenizer; known are tokenizer.json, tokenizer.model, tekken.json, tiktoken.model, "
            "tokenizer.tok.json, and vocab.json with merges.txt. Download the model again."
        )
    return tokenizer_json.load(imported.data, str(folder / name)), imported.settings


def _bytes(folder: Path, name: str, limit: int) -> bytes:
    path = child(folder, name)
    descriptor, status = open_regular(path, TokenizerError)
    try:
        if status.st_size > limit:
            raise TokenizerError(f"{path}: the file has {status.st_size} bytes, and at most {limit} are read.")
        data = bytearray(status.st_size)
        read_exactly(descriptor, data, 0, path, TokenizerError)
    finally:
        os.close(descriptor)
    return bytes(data)


def _read(folder: Path, name: str) -> dict[str, Any]:
    if not os.path.lexists(folder / name):
        return {}
    return read_json(child(folder, name), error=TokenizerError)


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [index for index in values if isinstance(index, int) and not isinstance(index, bool)]


def _token_text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def _added_token(fields: dict[str, Any]) -> AddedToken:
    flags = {
        name: fields[name] for name in ("single_word", "lstrip", "rstrip", "normalized", "special") if name in fields
    }
    if not isinstance(fields["content"], str) or not all(isinstance(flag, bool) for flag in flags.values()):
        raise ValueError(fields)
    return AddedToken(fields["content"], **flags)

"""Compiler of JSON schemas, regular expressions and Lark grammars for the tokenizer of one model."""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import llguidance

from mlxarch.errors import InvalidInput, InvalidSchema, TokenizerError
from mlxarch.structured_output.matcher import Grammar
from mlxarch.structured_output.schema import prepare
from mlxarch.tokenizer.tokenizer import Tokenizer

_CACHED_GRAMMARS = 64
_NO_TEXT = "\x02"  # a character that merges with no other
_MAX_SOURCE = 4 << 20  # characters of a grammar
_JSON_OPTIONS = {
    # Free whitespace lets a small model write blanks until its limit
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,
    "lenient": True,
}
# Bounds on the work of one token and on memory; the others are llguidance's
_LIMITS = {"max_lexer_states": 100_000, "verbose_errors": False}


class GrammarCompiler:
    """Compiler for one tokenizer; compiled grammars are kept, the latest 64 of them.

    Args:
        tokenizer: the model's tokenizer.
        vocab_size: width of the logits; ids without a token are never allowed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[str, ...], Grammar] = OrderedDict()

    def json_schema(self, schema: Mapping[str, Any] | bool, *, strict: bool = False) -> Grammar:
        """Compile a JSON schema.

        Args:
            schema: JSON schema of any dialect from draft 4 to 2020-12.
            strict: refuse a schema with a keyword that no grammar can hold; otherwise such a
                keyword gives a warning, and ``Grammar.violations`` checks the finished answer.

        Raises:
            UnsupportedSchema: ``strict``, and such a keyword occurs; it is named with its path.
            InvalidSchema: the schema contradicts itself, or is no JSON schema.
        """
        key = ("json_schema", str(strict), _dump(schema))
        return self._cached(key, lambda: self._compile_schema(schema, strict))

    def json_object(self) -> Grammar:
        """Compile the grammar of any JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> Grammar:
        """Compile a regular expression that the whole answer matches.

        Raises:
            InvalidSchema: it is not understood, or has look-around or references.
        """
        _check_source(pattern, "a regular expression")
        return self.lark(f"start: /{llguidance.regex_to_lark(pattern, '')}/")

    def lark(self, text: str) -> Grammar:
        """Compile a grammar in llguidance's variant of Lark, whose first rule is ``start``.

        Raises:
            InvalidSchema: the grammar is not understood.
        """
        _check_source(text, "a grammar")
        return self._cached(
            ("lark", text), lambda: self._compile(text, f"%lark {{\n{text}\n}}", (), None)
        )

    def prepare(self) -> None:
        """Read the vocabulary now, which takes seconds, rather than with the first grammar."""
        _ = self._vocabulary

    def _compile_schema(self, schema: Mapping[str, Any] | bool, strict: bool) -> Grammar:
        prepared = prepare(schema, strict=strict, compiles=self._compiles)
        options = {"x-guidance": _JSON_OPTIONS}
        rule = f"%json {_dump(prepared.schema | options)}"
        checked = schema if prepared.dropped else None
        return self._compile(f"start: {rule}", rule, tuple(prepared.warnings), checked)

    def _compiles(self, schema: dict[str, Any]) -> bool:
        """Whether a part of a schema compiles, warnings counted as a refusal."""
        source = f"start: %json {_dump(schema)}"
        failed, _ = llguidance.LLMatcher.validate_grammar_with_warnings(
            llguidance.LLMatcher.grammar_from_lark(source), None, limits=_limits()
        )
        return not failed

    def _compile(self, source: str, rule: str, warnings: tuple[str, ...], schema: Any) -> Grammar:
        grammar = llguidance.LLMatcher.grammar_from_lark(source)
        state = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0, limits=_limits())
        if state.is_error():
            raise InvalidSchema(f"the answer's grammar is refused: {_reason(state.get_error())}")
        return Grammar(rule, warnings, schema, state, self._vocab_size, self._newlines)

    def _cached(self, key: tuple[str, ...], make: Callable[[], Grammar]) -> Grammar:
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        grammar = make()
        with self._lock:
            self._cache[key] = grammar
            while len(self._cache) > _CACHED_GRAMMARS:
                self._cache.popitem(last=False)
        return grammar

    @cached_property
    def _tokens(self) -> list[bytes]:
        """Bytes of each token id; empty for an id without a token."""
        known = self._tokenizer.vocabulary_bytes()
        return [known.get(token, b"") for token in range(self._vocab_size)]

    @cached_property
    def _newlines(self) -> frozenset[int]:
        return frozenset(
            token for token, text in enumerate(self._tokens) if text and not text.strip(b"\n")
        )

    @cached_property
    def _vocabulary(self) -> llguidance.LLTokenizer:
        ends = sorted(token for token in self._tokenizer.eos_ids if token < self._vocab_size)
        if ends:
            source = _TokenSource(self._tokenizer, self._tokens, ends)
        else:  # llguidance needs one; behind the vocabulary it is never chosen
            ends = [self._vocab_size]
            source = _TokenSource(self._tokenizer, [*self._tokens, b"<end>"], ends)
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(source), eos_token=ends)


class _TokenSource:
    """Tokenizer in the form that llguidance reads."""

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], ends: list[int]) -> None:
        self._tokenizer = tokenizer
        self.tokens = tokens
        self.eos_token_id = ends[0]
        self.bos_token_id = tokenizer.bos_id
        control = tokenizer.control_ids.union(ends)
        self.special_token_ids = sorted(token for token in control if token < len(tokens))
        self._ids = {text: token for token, text in enumerate(tokens) if token not in control}
        self._longest = max(map(len, tokens), default=1)

    def __call__(self, text: str) -> list[int]:
        """Token ids whose bytes are the text's, without the blank that SentencePiece puts first."""
        for before in ("", _NO_TEXT):
            try:
                ids = self._tokenizer.encode(
                    before + text, add_special_tokens=False, parse_special=False
                )
            except (TokenizerError, InvalidInput) as problem:
                raise ValueError(str(problem)) from problem
            for start in range(min(len(ids), len(before) + 2)):
                if b"".join(self.tokens[token] for token in ids[start:]) == text.encode():
                    return ids[start:]
        return self._longest_matches(text.encode())

    def _longest_matches(self, text: bytes) -> list[int]:
        """Split a text into the longest tokens from the left; what no token begins is left out."""
        ids: list[int] = []
        start = 0
        while start < len(text):
            ends = range(min(len(text), start + self._longest), start, -1)
            end = next((end for end in ends if text[start:end] in self._ids), None)
            if end is not None:
                ids.append(self._ids[text[start:end]])
            start = end or start + 1
        return ids


def _limits() -> llguidance.LLParserLimits:
    return llguidance.LLParserLimits(**_LIMITS)  # type: ignore[arg-type]


def _dump(schema: Any) -> str:
    """JSON text of a schema.

    Raises:
        InvalidSchema: it holds something that JSON has not, or is too large.
    """
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as problem:
        raise InvalidSchema(f"the schema is not JSON: {problem}") from None
    _check_source(text, "a schema")
    return text


def _check_source(text: str, what: str) -> None:
    if not isinstance(text, str):
        raise InvalidSchema(f"{what} must be a text, found {type(text).__name__}")
    if len(text) > _MAX_SOURCE:
        raise InvalidSchema(
            f"{what} has {len(text)} characters; at most {_MAX_SOURCE} are compiled"
        )


def _reason(error: str) -> str:
    """First line of an error of llguidance, without the position in our own grammar."""
    lines = [line for line in error.strip().splitlines() if line.strip()]
    first = lines[0] if lines else "no reason given"
    return first.partition("failed to compile JSON schema: ")[2] or first[:300]

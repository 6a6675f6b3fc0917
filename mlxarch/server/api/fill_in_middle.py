"""Prompts that ask a model of code for the text between a beginning and an end.

The marks are those of the models' own documentation: Qwen2.5-Coder and Qwen3, StarCoder 2 and
Granite, DeepSeek-Coder, CodeGemma, GLM-4, and Codestral, which wants the end first.
"""

from dataclasses import dataclass

from mlxarch.server.http.errors import invalid
from mlxarch.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class _Marks:
    """Tokens in front of the beginning and the end of the text, and in front of the middle."""

    beginning: str
    end: str
    middle: str = ""
    end_first: bool = False


_MARKS = (
    _Marks("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    _Marks("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    _Marks("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    _Marks("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
    _Marks("[PREFIX]", "[SUFFIX]", end_first=True),
)


def fill_in_prompt(tokenizer: Tokenizer, beginning: str, end: str) -> list[int]:
    """Token ids of a prompt whose answer is the text between ``beginning`` and ``end``.

    Raises:
        ApiError: the vocabulary has no marks for that.
    """
    marks = next((marks for marks in _MARKS if _has(tokenizer, marks)), None)
    if marks is None:
        raise invalid(
            "this model was not trained to fill in a middle: its vocabulary has no marks for it; "
            "leave suffix out",
            "suffix",
            "unsupported_value",
        )
    first = [_id(tokenizer, marks.beginning), *_ids(tokenizer, beginning)]
    last = [_id(tokenizer, marks.end), *_ids(tokenizer, end)]
    body = [*last, *first] if marks.end_first else [*first, *last]
    if marks.middle:
        body.append(_id(tokenizer, marks.middle))
    starts = tokenizer.bos_id is not None and tokenizer.encode("a")[0] == tokenizer.bos_id
    return [tokenizer.bos_id, *body] if starts and tokenizer.bos_id is not None else body


def _has(tokenizer: Tokenizer, marks: _Marks) -> bool:
    texts = (marks.beginning, marks.end, marks.middle)
    return all(not text or tokenizer.token_id(text) is not None for text in texts)


def _id(tokenizer: Tokenizer, mark: str) -> int:
    token = tokenizer.token_id(mark)
    assert token is not None
    return token


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of code, in which a control token that is spelled out is text."""
    return tokenizer.encode(text, add_special_tokens=False, parse_special=False) if text else []

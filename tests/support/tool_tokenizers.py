"""A small tokenizer with the chat template and the marks of any family, and a random model's words."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from mlxarch import Tokenizer
from mlxarch.structured_output.compiler import GrammarCompiler
from mlxarch.structured_output.matcher import Matcher
from mlxarch.tokenizer.load_json import load_tokenizer_json

FIXTURES = Path(__file__).parents[1] / "fixtures"
_MARKS = re.compile(
    r"<[|｜][^<>|｜\s]+[|｜]>|<\|tool_call>|<tool_call\|>|\[/?[A-Z_]{4,}\]|</?(?:think|tool_call|arg_key|arg_value)>|<(?:start|end)_of_turn>"
)
ENDING = '"}0' + "\n"  # characters that lead to an end: they are favoured, or few answers end


def template_text(name: str) -> str:
    return (FIXTURES / "chat_templates" / name).read_text(encoding="utf-8")


def make_tokenizer(name: str, *, marks: bool = True, more: tuple[str, ...] = ()) -> Tokenizer:
    """A tokenizer with a template, a file or its text, all whose marks are single tokens."""
    template = template_text(name) if name.endswith(".jinja") else name
    found = sorted(set(_MARKS.findall(template)) if marks else ()) + [*more, "<s>", "</s>"]
    folder = FIXTURES / "tokenizers" / "qwen3"
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    document["added_tokens"] = []
    first = max(document["model"]["vocab"].values()) + 1
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for index, text in enumerate(dict.fromkeys(found), first):
        special = not text.startswith(("<tool", "</tool", "<think", "</think", "<arg", "</arg"))
        document["added_tokens"].append({"id": index, "content": text, "special": special} | flags)
        document["model"]["vocab"][text] = index
    loaded = load_tokenizer_json(json.dumps(document).encode(), "tokenizer.json")
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(loaded, settings=settings, templates={"default": template})


def make_compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size)


def write(
    tokenizer: Tokenizer, matcher: Matcher, seed: int, limit: int = 900
) -> tuple[list[int], bool]:
    """Tokens that random logits choose under a matcher, and whether the answer ended by itself.

    The model does not begin to think; it likes to end what it has begun, but not the answer as
    long as another call may follow the first one.
    """
    ends = sorted(tokenizer.eos_ids)
    goes_on = True
    random = np.random.default_rng(seed)
    favoured = [token for each in ENDING for token in tokenizer.encode(each)[-1:]]
    favoured += [*tokenizer.control_ids, *tokenizer.eos_ids]
    tokens: list[int] = []
    while len(tokens) < limit:
        logits = random.gumbel(size=tokenizer.vocab_size)
        logits[favoured] += 5
        logits[[token for token in [tokenizer.token_id("<think>")] if token is not None]] = -1e9
        mask = matcher.mask()
        assert mask is not None
        if goes_on and mask[ends].any() and mask.sum() > len(ends):
            goes_on = False
            mask[ends] = False
        token = int(np.argmax(np.where(mask, logits, -np.inf)))
        if token in tokenizer.eos_ids:
            return tokens, True
        matcher.consume(token)
        tokens.append(token)
        if matcher.stopped:
            return tokens, True
    return tokens, False


def collect(reader: Any, tokens: list[int]) -> list[Any]:
    """Events of an answer."""
    events = []
    for token in tokens:
        events += reader.add(token)
        if reader.ended:
            break
    return [*events, *reader.finish()]

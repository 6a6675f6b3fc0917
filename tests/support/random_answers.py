"""Answers of a model with random weights, without the model: random logits under a matcher's mask."""

from pathlib import Path

import numpy as np

from mlxarch import Tokenizer
from mlxarch.structured_output.compiler import GrammarCompiler
from mlxarch.structured_output.matcher import Grammar

TOKENIZERS = Path(__file__).parents[1] / "fixtures" / "tokenizers"
PADDING = 19  # rows of the embedding without a token
ENDING = '"]} \n'  # characters that lead to an end: they are favoured, or few answers end


def make_compiler(name: str) -> tuple[Tokenizer, GrammarCompiler]:
    tokenizer = Tokenizer.from_folder(TOKENIZERS / name)
    return tokenizer, GrammarCompiler(tokenizer, tokenizer.vocab_size + PADDING)


def random_answer(
    tokenizer: Tokenizer, grammar: Grammar, seed: int, limit: int = 400
) -> str | None:
    """Text of an answer that ended by itself; None for one that the limit cut off."""
    random = np.random.default_rng(seed)
    matcher = grammar.matcher()
    width = tokenizer.vocab_size + PADDING
    favoured = [token for each in ENDING for token in tokenizer.encode(each)[-1:]]
    favoured += tokenizer.eos_ids
    tokens: list[int] = []
    while len(tokens) < limit:
        logits = random.gumbel(size=width)
        logits[favoured] += 5
        mask = matcher.mask()
        token = int(np.argmax(logits if mask is None else np.where(mask, logits, -np.inf)))
        matcher.consume(token)
        if token in tokenizer.eos_ids:
            return tokenizer.decode(tokens)
        tokens.append(token)
        if matcher.stopped:
            return tokenizer.decode(tokens)
    return None

"""Grammars of texts as they stand inside JSON."""

import json
import re

import pytest
from tool_tokenizers import make_compiler, make_tokenizer, write

from mlxarch.errors import InvalidSchema
from mlxarch.structured_output.json_quoting import quoted_grammar, quoted_regex

REGEXES = [
    r"[^a]{2,9}",
    r'\s"\\x\n',
    r'[\w"\\\]]{5}',
    r"\d{2}-\w",
    '(?:a|")+',
    r"\x22\u0041?",
    r"\S\W",
]
TEXTS = ["bc", ' "\\x\n', 'a"\\]b', "12-x", 'a"a', '"A', '"', "\n\n", "\\ ", '\t"', "é\n", "aa"]


@pytest.mark.parametrize("pattern", REGEXES)
def test_a_quoted_expression_matches_the_quoted_texts_alone(pattern):
    # Python knows no intersection of classes: a look-ahead says the same
    intersection = re.compile(r"\[(\[.+?\]|\\.)&&(\[.*?\\x1f\])\]")
    quoted = re.compile(intersection.sub(r"(?:(?=\2)\1)", quoted_regex(pattern)))
    for text in TEXTS:
        inside = json.dumps(text, ensure_ascii=False)[1:-1]
        assert bool(quoted.fullmatch(inside)) == bool(re.fullmatch(pattern, text)), text


def test_what_a_model_writes_between_quotes_is_a_text_of_the_grammar():
    lark = 'start: "\\"" (LETTER | /[^a-z]/){2} "a".."c" WS\nLETTER: "\\\\" // one\n%import common (WS, INT)'
    tokenizer = make_tokenizer("published/qwen3.jinja")
    compiler = make_compiler(tokenizer)
    between = f'start: "\\"" inner "\\""\ninner: %lark {{\n{quoted_grammar(lark)}\n}}'
    grammar = compiler.lark(between)
    for seed in range(5):
        tokens, ended = write(tokenizer, grammar.matcher(), seed)
        assert ended
        assert re.fullmatch(r'"[^a-z]{2}[abc][ \t\f\r\n]+', json.loads(tokenizer.decode(tokens)))


@pytest.mark.parametrize(
    "lark", ["start: %json {}", "start: @x", "start: <|im_end|>", "%import a.b"]
)
def test_what_has_no_form_in_json_is_refused(lark):
    with pytest.raises(InvalidSchema):
        quoted_grammar(lark)

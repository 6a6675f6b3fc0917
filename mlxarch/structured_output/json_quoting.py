"""Grammars of texts as they stand inside JSON: each character that JSON escapes, escaped.

The input of a tool can have a grammar of its own, while the model writes it as a text within the
JSON of its call. So the terminals of the grammar are rewritten: ``"a\\n"`` becomes ``"a\\\\n"``, and a
class of characters an alternative of its plain characters and of the escapes of the others.
"""

import json
import re

from mlxarch.errors import InvalidSchema

_ESCAPES = {char: json.dumps(char)[1:-1] for char in '"\\\b\t\n\f\r'}
_PLAIN = r'[^"\\\x00-\x1f]'  # characters that stand for themselves
_COMMON = {  # terminals of Lark's library that can match an escaped character
    "CR": r"\r",
    "LF": r"\n",
    "NEWLINE": r"(\r?\n)+",
    "WS": r"[ \t\f\r\n]+",
    "WS_INLINE": r"[ \t]+",
    "ESCAPED_STRING": r'"([^"\\\n]|\\.)*"',
    "_STRING_INNER": r".*?",
    "_STRING_ESC_INNER": r".*?(\\\\)*?",
    "SH_COMMENT": r"#[^\n]*",
    "CPP_COMMENT": r"//[^\n]*",
    "SQL_COMMENT": r"--[^\n]*",
}
_STRING = r'"(?:\\.|[^"\\\n])*"'
_TOKEN = re.compile(
    rf"(?P<comment>(?:\#|//)[^\n]*)|(?P<range>{_STRING}\s*\.\.\s*{_STRING})|(?P<string>{_STRING})"
    r"|(?P<regex>/(?:\\.|[^/\\\n])+/(?P<flags>[imslux]*))"
    r"|(?P<import>%import[ \t]+common\b[^\n]*)"
    r"|(?P<other>%(?:json|lark|regex|declare|override|import)\b|@[a-z]|<[^<>\s]+>)|(?P<rest>.|\n)",
)
_PIECE = re.compile(
    r"(?P<set>\[\^?\]?(?:\\.|\[[^\]]*\]|[^\]\\])*\])|(?P<group>\(\?[^:)]*:?)"
    r"|(?P<code>\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\[pP](?:\{\w+\}|\w)|\\.)|(?P<char>.|\n)",
    re.DOTALL,
)


def quoted_grammar(lark: str) -> str:
    """Grammar of the texts of another one, as they stand between the quotes of JSON.

    Args:
        lark: grammar in Lark.

    Raises:
        InvalidSchema: it has a part that has no form inside JSON.
    """
    return "".join(_quoted_token(match) for match in _TOKEN.finditer(lark))


def quoted_regex(pattern: str, dot_is_all: bool = False) -> str:
    """Regular expression of the texts of another one, as they stand between the quotes of JSON.

    Args:
        pattern: regular expression.
        dot_is_all: whether a dot matches a newline as well.
    """
    return "".join(_quoted_piece(match, dot_is_all) for match in _PIECE.finditer(pattern))


def _quoted_token(match: re.Match[str]) -> str:
    text = match[0]
    match match.lastgroup if match["regex"] is None else "regex":
        case "comment":
            return ""
        case "range":
            first, last = (_value(each) for each in re.findall(_STRING, text))
            return f"/{_characters(f'[{re.escape(first)}-{re.escape(last)}]', False)}/"
        case "string":
            inner = json.dumps(_value(text), ensure_ascii=False)[1:-1]
            return json.dumps(inner, ensure_ascii=False)
        case "regex":
            flags = match["flags"]
            body = text[1 : len(text) - len(flags) - 1]
            return f"/{quoted_regex(body, 's' in flags)}/{flags.replace('s', '')}"
        case "import":
            return _imported(text)
        case "other":
            raise InvalidSchema(f"the grammar of a tool's input cannot use {text:.40}")
        case _:
            return text


def _value(text: str) -> str:
    """Text of a string of Lark."""
    try:
        return json.loads(re.sub(r"\\x([0-9a-fA-F]{2})", r"\\u00\1", text))
    except ValueError:
        raise InvalidSchema(f"the grammar has a string that cannot be read: {text:.80}") from None


def _imported(line: str) -> str:
    """Imports from Lark's library, of which some become terminals of their own."""
    single = re.fullmatch(r"%import\s+common\.(\w+)\s*(?:->\s*(\w+))?\s*(?://.*)?", line)
    several = re.fullmatch(r"%import\s+common\s*\(([\w\s,]+)\)\s*(?://.*)?", line)
    if single is not None:
        names = {single[1]: single[2] or single[1]}
    elif several is not None:
        names = {name: name for name in re.findall(r"\w+", several[1])}
    else:
        raise InvalidSchema(f"the grammar has an import that cannot be read: {line:.80}")
    lines = []
    for name, alias in names.items():
        if name in _COMMON:
            lines.append(f"{alias}: /{quoted_regex(_COMMON[name])}/")
        else:
            lines.append(f"%import common.{name} -> {alias}")
    return "\n".join(lines)


def _quoted_piece(match: re.Match[str], dot_is_all: bool) -> str:
    text = match[0]
    if match.lastgroup == "set" or text in (r"\s", r"\S", r"\D", r"\W") or text.startswith(r"\P"):
        return _characters(text, False)
    if match.lastgroup == "code":
        found = (
            [char for char in _ESCAPES if re.fullmatch(text, char)] if text[1] not in "pbB" else []
        )
        return f"(?:{re.escape(_ESCAPES[found[0]])})" if len(found) == 1 else text
    if text == ".":
        return _characters(".", dot_is_all)
    if match.lastgroup == "char" and text in _ESCAPES:
        return f"(?:{re.escape(_ESCAPES[text])})"
    return text


def _characters(one: str, dot_is_all: bool) -> str:
    """Expression of one character: plain ones of the class, or the escapes of its others."""
    flags = re.DOTALL if dot_is_all else re.NOFLAG
    try:
        others = [
            re.escape(code) for char, code in _ESCAPES.items() if re.fullmatch(one, char, flags)
        ]
    except re.error as error:
        raise InvalidSchema(
            f"the grammar has a class that cannot be read, {one:.80}: {error}"
        ) from None
    plain = _PLAIN if one == "." else f"[{one}&&{_PLAIN}]"
    return f"(?:{'|'.join([plain, *others])})"

"""Code blocks of Markdown for a terminal: highlighted lines that can be copied and run.

A line is written as the model wrote it: without padding, with its tabs, and not wrapped; the
terminal continues a long line on the next row, and copies it as one.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markdown_it.token import Token

# Characters of a private use area around a number stand for a block until the rest is laid out
_OPEN, _CLOSE = "\ue0c0", "\ue0c1"


class CodeBlocks:
    """Code blocks taken out of a parsed document, to be put into its rendered lines."""

    def __init__(self) -> None:
        self._blocks: list[list[str]] = []

    def take_out(self, tokens: "list[Token]") -> "list[Token]":
        """Replace each code block by a paragraph that marks its place."""
        from markdown_it.token import Token

        replaced: list[Token] = []
        for token in tokens:
            if token.type not in ("fence", "code_block"):
                replaced.append(token)
                continue
            mark = f"{_OPEN}{len(self._blocks)}{_CLOSE}"
            words = token.info.split()
            self._blocks.append(highlight(token.content, words[0] if words else ""))
            text = Token("text", "", 0, content=mark)
            opening = Token("paragraph_open", "p", 1, block=True, level=token.level)
            inline = Token("inline", "", 0, content=mark, children=[text], block=True)
            closing = Token("paragraph_close", "p", -1, block=True, level=token.level)
            replaced += [opening, inline, closing]
        return replaced

    def put_in(self, lines: list[str]) -> list[str]:
        """Replace each marked line by the lines of its block, from the first column on."""
        result: list[str] = []
        for line in lines:
            _, opened, rest = line.partition(_OPEN)
            number = rest.partition(_CLOSE)[0]
            if opened and number.isdigit() and int(number) < len(self._blocks):
                result += self._blocks[int(number)]
            else:
                result.append(line)
        return result


def highlight(code: str, language: str) -> list[str]:
    """Lines of code with terminal colors; the text stays what it was."""
    from pygments import format as to_text
    from pygments.formatters import TerminalFormatter
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    lines = code.removesuffix("\n").split("\n")
    try:
        lexer = get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return lines
    colored = to_text(lexer.get_tokens("\n".join(lines)), TerminalFormatter()).split("\n")
    return colored if len(colored) == len(lines) else lines

"""Rendering of an answer in a terminal while it grows."""

import random
import re
import sys

import pytest
from terminal import Screen

from mlxarch.cli import render
from mlxarch.cli.output import show_control_characters

DOCUMENT = """# A heading

A paragraph with **bold** words, *slanted* ones and `code`, long enough to need a second line on a narrow terminal.
The next line stays a line.

Before a list
- one
- two with a [link](http://example.com/x) and ![picture](http://example.com/p.png)
  - nested, and long enough that it needs a second line on a terminal as narrow as this
- three

1. first
2. second

   still the second
3. third

```python
def f(x):
    # a comment
    return [x, "<b>", 'c']
```

> quoted
> twice

| a | b |
|---|--:|
| 1 | 2 |
| a longer cell | 日本語テキスト |

---

<think>
thoughts of a <b>model</b>
</think>

The end is 42
"""


class Stage:
    """Standard output as a terminal of a certain size."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, columns: int = 60, rows: int = 12) -> None:
        self.screen = Screen(columns, rows)
        self.written: list[str] = []
        for name, value in {
            "TERM": "xterm-256color",
            "COLUMNS": str(columns),
            "LINES": str(rows),
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setattr(sys, "stdout", self)
        self.encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if text:
            self.written.append(text)
            self.screen.write(text)
        return len(text)

    def flush(self) -> None: ...

    def show(self, pieces: list[str], *, every: bool = True) -> list[str]:
        out = render.make_answer_writer()
        for piece in pieces:
            if every and isinstance(out, render.MarkdownWriter):
                out._next_draw = 0  # no waiting between two pictures
            out.add(piece)
        out.finish()
        return self.screen.text()


def pieces_of(text: str, seed: int) -> list[str]:
    draw, pieces, start = random.Random(seed), [], 0
    while start < len(text):
        end = start + draw.randint(1, 9)
        pieces.append(text[start:end])
        start = end
    return pieces


@pytest.mark.parametrize("rows", [7, 12, 100])
def test_markdown_that_grows_ends_as_if_it_had_come_at_once(monkeypatch, rows):
    with monkeypatch.context() as patch:
        expected = Stage(patch, rows=1000).show([DOCUMENT])
    for seed in range(3):
        with monkeypatch.context() as patch:
            assert Stage(patch, rows=rows).show(pieces_of(DOCUMENT, seed)) == expected


def test_no_word_of_a_document_is_lost_or_shown_twice(monkeypatch):
    with monkeypatch.context() as patch:
        text = "\n".join(Stage(patch, rows=6).show(list(DOCUMENT)))
    for part in (
        "A heading",
        "<think>",
        "</think>",
        "<b>model</b>",
        "(http://example.com/x)",
        "p.png",
        "日本語",
        "42",
    ):
        assert text.count(part) == 1, part
    assert "**" not in text and "```" not in text and "# A" not in text
    assert "The next line stays a line." in text.splitlines()


def test_a_long_code_block_scrolls_and_is_not_repeated(monkeypatch):
    code = "```\n" + "".join(f"line {n}\n" for n in range(60)) + "```\n\nafter it"
    with monkeypatch.context() as patch:
        stage = Stage(patch, rows=8)
        shown = [line.strip() for line in stage.show(list(code)) if line.strip()]
    assert shown == [*(f"line {n}" for n in range(60)), "after it"]


CODE = """\
def f(x):
\tif x:
\t\treturn [number for number in range(100) if number % 3 == 0 or number % 5 == 0 or number == x]

    # an indented comment
""".rstrip("\n")


@pytest.mark.parametrize("language", ["python", "", "no-such-language", "python title=x"])
@pytest.mark.parametrize("list_item", [False, True])
def test_lines_of_code_are_what_the_model_wrote(monkeypatch, language, list_item):
    fence = f"```{language}\n{CODE}\n```"
    source = "Before:\n\n" + fence
    if list_item:
        source = "1. Before:\n\n" + "\n".join(f"   {line}" for line in fence.split("\n"))
    with monkeypatch.context() as patch:
        stage = Stage(patch, rows=40)
        stage.show(pieces_of(source + "\n\nAfter", 1))
        whole = Stage(patch, rows=40)
        whole.show([source])
    written = re.sub(r"\x1b\[[0-9;]*[mKJ]", "", "".join(whole.written))
    assert f"\n{CODE}\n" in written  # tabs, blanks and long lines
    *before, after, end = stage.screen.text()
    assert (after, end) == ("After", "")
    assert before == whole.screen.text()  # drawn anew with each piece, and the same


def test_a_plain_paragraph_is_appended_and_never_rewritten(monkeypatch):
    with monkeypatch.context() as patch:
        stage = Stage(patch)
        stage.show(["Only ", "a few ", "words"])
    assert stage.written == ["Only", " a few", " words", "\n"]


def test_nothing_above_a_finished_block_is_written_again(monkeypatch):
    with monkeypatch.context() as patch:
        stage = Stage(patch, rows=50)
        stage.show(["first **block**\n\n", "second\n\n", "*thi", "rd*", " more"])
    after = "".join(stage.written[2:])
    assert "first" not in after and "block" not in after


def test_marks_without_a_meaning_yet_are_held_back(monkeypatch):
    with monkeypatch.context() as patch:
        stage = Stage(patch)
        out = render.make_answer_writer()
        assert isinstance(out, render.MarkdownWriter)
        out.add("A paragraph\n")
        before = stage.screen.text()
        out._next_draw = 0
        out.add("-")  # would make the paragraph a heading
        assert stage.screen.text() == before
        out.finish()
    with monkeypatch.context() as patch:
        assert Stage(patch).show(["A\n\n", "4", "2"])[-2:] == ["42", ""]


def test_pictures_are_not_drawn_for_every_token(monkeypatch):
    with monkeypatch.context() as patch:
        stage = Stage(patch)
        stage.show(["**w** "] * 500, every=False)
    assert len(stage.written) < 100


def test_a_narrower_window_loses_nothing_below_the_change(monkeypatch):
    with monkeypatch.context() as patch:
        stage = Stage(patch, columns=60, rows=30)
        out = render.make_answer_writer()
        out.add("finished\n\nthe last block grows")
        stage.screen.columns = 30
        patch.setenv("COLUMNS", "30")
        assert isinstance(out, render.MarkdownWriter)
        out._next_draw = 0
        out.add(" on and on and on")
        out.finish()
        words = " ".join(stage.screen.text()).split()
    assert " ".join(words) == "finished the last block grows on and on and on"


EVIL = [
    "\x1b[2J",
    "\x1b]0;title\x07",
    "\x9b31m",
    "\x90q\x9c",
    "\x08\x08",
    "\x7f",
    "a\rb",
    "&#27;[2J",
]


@pytest.mark.parametrize("evil", EVIL)
@pytest.mark.parametrize("kind", ["text", "markdown"])
def test_control_characters_never_reach_the_terminal(monkeypatch, evil, kind):
    with monkeypatch.context() as patch:
        stage = Stage(patch)
        out = render.PlainTextWriter() if kind == "text" else render.MarkdownWriter()
        for character in f"x{evil}y\n\n```\n{evil}\n```\n\n**{evil}**":
            out.add(character)
        out.finish()
        written = "".join(stage.written)
    ours = (
        written.replace("\x1b[K", "").replace("\x1b[J", "").replace("\r", "")
        if kind == "markdown"
        else written
    )
    for sequence in ("2J", "]0;", "\x07", "\x9b", "\x90", "\x08", "\x7f"):
        assert f"\x1b[{sequence}" not in ours and (sequence.isprintable() or sequence not in ours)
    assert kind == "markdown" or not {"\x1b", "\r"} & set(written)


def test_newline_and_tab_stay_and_text_of_all_scripts_too():
    text = "a\tb\nс日本🙂e\u0301 \u200d"
    assert show_control_characters(text) == text
    assert show_control_characters("\x1b\x00\x7f\x85\r") == "␛␀␡\ufffd"


def test_plain_text_ends_with_one_newline(capsys):
    for pieces in (["a", "b"], ["a", "b\n"]):
        out = render.PlainTextWriter()
        for piece in pieces:
            out.add(piece)
        out.finish()
    assert capsys.readouterr().out == "ab\nab\n"


@pytest.mark.parametrize(
    ("terminal", "no_color", "term", "plain", "kind"),
    [
        (True, "", "xterm", False, render.MarkdownWriter),
        (True, "1", "xterm", False, render.PlainTextWriter),
        (True, "", "dumb", False, render.PlainTextWriter),
        (True, "", "xterm", True, render.PlainTextWriter),
        (False, "", "xterm", False, render.PlainTextWriter),
    ],
)
def test_markdown_is_for_terminals_with_colors(monkeypatch, terminal, no_color, term, plain, kind):
    with monkeypatch.context() as patch:
        stage = Stage(patch)
        patch.setattr(stage, "isatty", lambda: terminal)
        patch.setenv("NO_COLOR", no_color)
        patch.setenv("TERM", term)
        assert type(render.make_answer_writer(plain)) is kind

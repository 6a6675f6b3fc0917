"""The scripts of examples/ do what they say, with a real model and through pipes."""

import csv
import io
import os
import pty
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from house import ROOT

import mlxarch
from mlxarch.generation.answer import Result
from mlxarch.generation.timings import Timings
from mlxarch.language_model import LanguageModel
from mlxarch.tokenizer.tokenizer import Tokenizer
from mlxarch.tool_calls.events import ToolCall

pytestmark = pytest.mark.kernels  # a model answers, which they make five times faster
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
OTHER_SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.[ms][jh]*"))
NOWHERE = "./no-such-folder"


def run(script: str, *arguments: object, given: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        command, input=given, capture_output=True, text=True, env=environment, timeout=120
    )


def output(script: str, *arguments: object, given: str = "") -> str:
    done = run(script, *arguments, given=given)
    assert (done.returncode, done.stderr) == (0, ""), "silent where standard error is no terminal"
    return done.stdout


def test_a_script_has_at_most_50_lines_and_a_place_in_the_table():
    page = (EXAMPLES / "README.md").read_text()
    for script in SCRIPTS + OTHER_SCRIPTS:
        assert len((EXAMPLES / script).read_text().splitlines()) <= 50, script
        assert f"| `{script}" in page
    assert len(SCRIPTS + OTHER_SCRIPTS) == page.count("\n| `") == 11


# summarize_folder.py -------------------------------------------------------------------------------------------------


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    (tmp_path / "meeting.txt").write_text(
        "The meeting moved to Lisbon because the hotel in Porto was full."
    )
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    return tmp_path


def test_every_text_file_of_a_folder_gets_a_summary(smollm2, notes):
    nothing, empty, meeting = output(
        "summarize_folder.py", notes, "--piece", 36, "-m", smollm2
    ).split("## ")
    assert (nothing, empty.strip()) == ("", "empty.txt")
    assert meeting.startswith("meeting.txt\n\n")
    assert "Lisbon" in meeting.removeprefix("meeting.txt")


class Shortener:
    """Stands for a model: notes the prompts and answers with the first tokens of what it is to summarize."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer, self.texts = Tokenizer.from_folder(folder), []

    def session(self) -> None:
        return None

    def generate(self, prompt: list[int], *, max_tokens: int, session: object) -> SimpleNamespace:
        text = self.tokenizer.decode(prompt).split(":\n\n", 1)[1].split("\nassistant")[0]
        self.texts.append(text.strip())
        return SimpleNamespace(
            text=self.tokenizer.decode(self.tokenizer.encode(text.strip())[:max_tokens])
        )


def test_a_long_file_is_read_to_its_end_in_pieces_and_they_become_one_summary(
    smollm2, tmp_path, monkeypatch, capsys
):
    words = " ".join(f"Chapter {n} tells of the river and its boats." for n in range(60))
    (tmp_path / "book.txt").write_text(words)
    model = Shortener(smollm2)
    monkeypatch.setattr(mlxarch, "load", lambda name: model, raising=False)
    monkeypatch.setattr(sys, "argv", ["summarize_folder.py", str(tmp_path), "--piece", "100"])
    runpy.run_path(str(EXAMPLES / "summarize_folder.py"))
    total = len(model.tokenizer.encode(words))
    pieces = -(-total // 100)
    assert "".join(model.texts[:pieces]).replace(" ", "") == words.replace(" ", "")
    assert max(len(model.tokenizer.encode(text)) for text in model.texts) <= 100
    assert len(model.texts) > pieces + 1, "the summaries of the pieces did not fit either"
    assert capsys.readouterr().out.count("Chapter 0") == 1


# ask_stdin.py --------------------------------------------------------------------------------------------------------


def test_every_line_gets_an_answer_in_its_line(smollm2):
    questions = "What is the capital of France?\n\nHow many legs has a dog?\n"
    france, blank, dog = output(
        "ask_stdin.py", "--max-tokens", 8, "-m", smollm2, given=questions
    ).splitlines()
    assert "Paris" in france and blank == "" and "four" in dog


def test_answers_come_from_the_document(smollm2, notes):
    arguments = ("--about", notes / "meeting.txt", "--max-tokens", 8, "-m", smollm2)
    assert "Lisbon" in output("ask_stdin.py", *arguments, given="Where is the meeting?\n")


# classify_csv.py -----------------------------------------------------------------------------------------------------

REVIEWS = """\ufeffid,text
1,"I love this phone, it is great."
2,The screen broke after one day.

3,"Terrible
service."
"""


def test_all_rows_of_a_csv_are_classified_in_their_order(smollm2, tmp_path):
    (tmp_path / "reviews.csv").write_text(REVIEWS, encoding="utf-8")
    text = output(
        "classify_csv.py", tmp_path / "reviews.csv", "text", "positive", "negative", "-m", smollm2
    )
    assert list(csv.reader(io.StringIO(text))) == [
        ["id", "text", "label"],
        ["1", "I love this phone, it is great.", "positive"],
        ["2", "The screen broke after one day.", "negative"],
        ["3", "Terrible\nservice.", "negative"],
    ]


def test_a_label_is_one_of_the_list_even_if_none_fits(smollm2, tmp_path):
    (tmp_path / "reviews.csv").write_text("text\nYes\n")
    text = output(
        "classify_csv.py", tmp_path / "reviews.csv", "text", "purple", "Tuesday", "-m", smollm2
    )
    assert text in {"text,label\nYes,purple\n", "text,label\nYes,Tuesday\n"}


# chat_loop.py --------------------------------------------------------------------------------------------------------


def test_a_chat_keeps_what_was_said_and_reads_only_what_is_new(smollm2, monkeypatch, capsys):
    turns: list[tuple[list[str], Timings]] = []
    stream = LanguageModel.stream

    def noted(self, prompt, **arguments):
        said = [message["content"] for message in prompt]
        for piece in stream(self, prompt, **arguments):
            yield piece
            if piece.finish_reason:
                turns.append((said, piece.timings))

    monkeypatch.setattr(LanguageModel, "stream", noted)
    monkeypatch.setattr(
        sys,
        "argv",
        ["chat_loop.py", "-m", str(smollm2), "--system", "Be brief.", "--max-tokens", "5"],
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello!\nAnd now?\n"))
    runpy.run_path(str(EXAMPLES / "chat_loop.py"))
    (first, begin), (second, after) = turns
    assert first == ["Be brief.", "Hello!"]
    assert second[:2] == first and second[3:] == ["And now?"]
    assert second[2] and f"> {second[2]}\n> " in capsys.readouterr().out, (
        "the answer as it was shown"
    )
    assert begin.reused_tokens == 0
    assert begin.prompt_tokens <= after.reused_tokens < after.prompt_tokens


def test_a_chat_through_a_pipe_answers_and_ends(smollm2):
    text = output("chat_loop.py", "-m", smollm2, "--max-tokens", 2, given="Hello!\n")
    assert text.startswith("> ") and len(text.split("\n")[0]) > 2 and text.endswith("\n> \n")


# Mistakes ------------------------------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[Callable[[Path], list[object]], str]] = {
    "no folder": (lambda here: ["summarize_folder.py", here / "none"], "no *.txt in"),
    "pieces of nothing": (
        lambda here: ["summarize_folder.py", here, "--piece", 0],
        "--piece must be 30 or more",
    ),
    "no model to summarize": (
        lambda here: ["summarize_folder.py", here, "-m", NOWHERE],
        NOWHERE[2:],
    ),
    "no document": (lambda here: ["ask_stdin.py", "--about", here / "none.txt"], "none.txt"),
    "no model to ask": (lambda here: ["ask_stdin.py", "-m", NOWHERE], NOWHERE[2:]),
    "no table": (lambda here: ["classify_csv.py", here / "none.csv", "text", "a", "b"], "none.csv"),
    "no labels": (lambda here: ["classify_csv.py", here / "table.csv", "text"], "labels"),
    "no such column": (
        lambda here: ["classify_csv.py", here / "table.csv", "words", "a", "b"],
        "a column 'words'",
    ),
    "a longer row": (
        lambda here: ["classify_csv.py", here / "ragged.csv", "text", "a"],
        "rows as long as its header",
    ),
    "no model to chat with": (lambda here: ["chat_loop.py", "-m", NOWHERE], NOWHERE[2:]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_a_message_and_no_traceback(mistake, notes):
    (notes / "table.csv").write_text("id,text\n1,One.\n")
    (notes / "ragged.csv").write_text("id,text\n1,One, two.\n")
    arguments, message = MISTAKES[mistake]
    done = run(*map(str, arguments(notes)))
    assert done.returncode in (1, 2) and done.stdout == ""
    assert message in done.stderr and "Traceback" not in done.stderr


def test_labels_that_begin_alike_are_refused(smollm2, notes):
    (notes / "table.csv").write_text("text\nOne.\n")
    done = run(
        "classify_csv.py", notes / "table.csv", "text", "not good", "not bad", "fine", "-m", smollm2
    )
    assert done.returncode == 1 and done.stdout == ""
    assert "begin with the same token" in done.stderr and done.stderr.endswith("fine\n")


def test_a_chat_that_does_not_fit_ends_with_a_message(smollm2):
    done = run("chat_loop.py", "-m", smollm2, "--max-tokens", 9000, given="Hello!\n")
    assert (
        done.returncode == 1
        and "do not fit into the context" in done.stderr
        and "Traceback" not in done.stderr
    )


# Silence -------------------------------------------------------------------------------------------------------------


def test_loading_shows_a_bar_where_standard_error_is_a_terminal(smollm2):
    # the control of output(), which finds nothing there otherwise
    reader, writer = pty.openpty()
    code = f"import mlxarch; mlxarch.load({str(smollm2)!r})"
    with subprocess.Popen(
        [sys.executable, "-c", code], stderr=writer, stdout=subprocess.PIPE
    ) as program:
        os.close(writer)
        shown = b""
        try:
            while data := os.read(reader, 1 << 16):
                shown += data
        except OSError:  # Linux: the other side is closed
            pass
        assert program.stdout is not None and program.stdout.read() == b""
    os.close(reader)
    assert program.returncode == 0 and b"\x1b[" in shown


# call_functions.py ---------------------------------------------------------------------------------------------------


def test_functions_are_called_and_their_results_reach_the_model(tmp_path, monkeypatch, capsys):
    (tmp_path / "note.txt").write_text("one two three")
    monkeypatch.chdir(tmp_path)
    calls = [
        ToolCall("1", "count_words", {"path": "../note.txt"}, "{}"),
        ToolCall("2", "count_words", {"path": "none.txt"}, "{}"),
        ToolCall("3", "multiply", {"a": 3, "b": 0.5}, "{}"),
    ]
    answers = [
        Result("", [], "stop", Timings(), calls=calls),
        Result("Three.", [], "stop", Timings()),
    ]
    prompts = []

    def generate(messages, *, tools, max_tokens):
        prompts.append(list(messages))
        assert [tool.name for tool in tools] == ["count_words", "multiply"]
        return answers[len(prompts) - 1]

    model = SimpleNamespace(generate=generate)
    monkeypatch.setattr(mlxarch, "load", lambda name: model, raising=False)
    monkeypatch.setattr(sys, "argv", ["call_functions.py", "How many words?"])
    runpy.run_path(str(EXAMPLES / "call_functions.py"))
    assert prompts[1][1] == answers[0].message
    three, error, product = prompts[1][2:]
    assert (three["content"], three["tool_call_id"], product["content"]) == ("3", "1", "1.5")
    assert error["content"].startswith("error:")
    assert capsys.readouterr().out == "Three.\n"

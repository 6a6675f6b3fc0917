"""mlxarch chat: at a terminal, where a person types, and through a pipe."""

import json
import stat
import sys

import pytest
from terminal import Person

PROMPT = ">>>"


@pytest.fixture
def person(home, tiny):
    def sit_down(*arguments: str, model: str = tiny, **environment: str) -> Person:
        command = [sys.executable, "-m", "mlxarch", "chat", model, "--no-loop-guard", *arguments]
        return Person(*command, **{"NO_COLOR": "1"} | environment)

    return sit_down


def test_a_chat_with_interrupts_retry_undo_save_and_load(person, home, tmp_path, endless):
    file = tmp_path / "talk.json"
    with person(model=endless) as user:
        user.sees(r"/help\s+lists\s+the\s+commands")
        user.sees(PROMPT)

        user.type("Hello\r")  # this model does not end by itself
        user.sees(r"Hello(?s:.)*?\x1b\[\?2004l(?s:.){40}")
        user.type("\x03")
        line = user.sees(
            r"stopped; the answer is kept as far as it came · first token after [^>]* tokens\s"
        )
        assert "reused" not in line
        user.sees(PROMPT)
        user.enters(f"/save {file}", "saved to ")
        messages = json.loads(file.read_text())["messages"]
        assert messages[0] == {"role": "user", "content": "Hello"}
        assert messages[1].pop("content") and messages[1] == {"role": "assistant", "stopped": True}

        user.enters("/set max_tokens 4", "max_tokens  4")
        assert user.enters("Again", r"cut off: max_tokens · .* (\d+) reused")
        user.enters("/undo", "forgotten: Again")
        assert "temperature is 0, so the answer will be the same" in user.enters(
            "/retry", "cut off: max_tokens"
        )
        user.enters("/save", "saved to ")
        messages = json.loads(file.read_text())["messages"]
        assert (
            len(messages) == 2 and len(messages[1]["content"]) <= 4 and "stopped" not in messages[1]
        )

        user.enters("/clear", "begins anew")
        assert "2 messages" in user.enters(f"/load {file}", "the last question: Hello")
        user.enters("/stats", r"3 answers · \d+ tokens in")
        user.type("/exit\r")
        assert user.leaves() == 0
    history = home / "state" / "history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "+Again" in history.read_text()


def test_inputs_of_several_lines_and_history(person, tmp_path):
    file = tmp_path / "talk.json"
    with person("-n", "2") as user:
        user.sees(PROMPT)
        user.enters('"""one\rtwo\r"""', "cut off")
        user.enters("three\x1b\rfour", "cut off")  # Alt-Enter
        user.enters("five\nsix", "cut off")  # Ctrl-J
        user.enters("\x1b[200~seven\neight\x1b[201~", "cut off")  # a paste
        user.enters("/wrong\x15nine", "cut off")  # Ctrl-U takes back what was typed
        user.enters("\x1b[A", "cut off")  # up: nine again
        user.enters("//etc is a folder", "cut off")
        user.enters(f"/save {file}", "saved to ")
        user.type("\x04")
        assert user.leaves() == 0
    asked = [
        message["content"]
        for message in json.loads(file.read_text())["messages"]
        if message["role"] == "user"
    ]
    assert asked == [
        "one\ntwo",
        "three\nfour",
        "five\nsix",
        "seven\neight",
        "nine",
        "nine",
        "/etc is a folder",
    ]


def test_what_is_typed_while_the_model_loads_is_sent_line_by_line(person, tmp_path):
    file = tmp_path / "talk.json"
    with person("-n", "2") as user:
        user.type(f'one\r"""two\rthree"""\r/save {file}\rfour')
        user.sees("saved to ")
        user.sees("four")  # the editor is there; Ctrl-J goes on being a line break
        user.enters("\nfive", "cut off")
        user.enters("/save", "saved to ")
        user.type("/exit\r")
        assert user.leaves() == 0
    asked = [
        message["content"]
        for message in json.loads(file.read_text())["messages"]
        if message["role"] == "user"
    ]
    assert asked == ["one", "two\nthree", "four\nfive"]


def test_what_is_typed_while_an_answer_is_written_is_sent_line_by_line(person, tmp_path, endless):
    file = tmp_path / "talk.json"
    with person("-n", "200", model=endless) as user:
        user.sees(PROMPT)
        user.type("one\r")
        user.sees(r"one(?s:.)*?\x1b\[\?2004l")  # the editor has left the terminal
        user.type(f'two\r"""three\rfour"""\r/save {file}\r')
        user.sees("saved to ")
        user.type("/exit\r")
        assert user.leaves() == 0
    asked = [
        message["content"]
        for message in json.loads(file.read_text())["messages"]
        if message["role"] == "user"
    ]
    assert asked == ["one", "two", "three\nfour"]


def test_ctrl_c_at_the_prompt_clears_the_line_and_twice_leaves(person):
    with person() as user:
        user.sees(PROMPT)
        user.type("half a thought\x03")
        user.sees("Ctrl-C again")
        user.sees(PROMPT)
        user.type("other\x03")
        user.sees("Ctrl-C again")
        user.sees(PROMPT)
        user.type("\x03")
        assert user.leaves() == 0


def test_mistakes_are_told_and_the_chat_goes_on(person):
    with person("-n", "2") as user:
        user.sees(PROMPT)
        for typed, told in [
            ("/retri", "did you mean /retry\\?"),
            ("/xyzzy", "/help lists them"),
            ("/set temprature 1", "did you mean temperature\\?"),
            ("/set temperature hot", "temperature must be a number"),
            ("/load nowhere.json", "there is no such file"),
            ("/undo", "there is no question yet"),
            ("/retry", "there is no question yet"),
            ("/stats maybe", "on or off"),
            ("word " * 1500, "do not fit into the context"),
        ]:
            user.enters(typed, f"error: .*{told}")
        user.enters("/set", r"temperature +0\.0")
        user.enters("/system Be brief", "is set")
        user.enters("/help", "/exit")
        user.enters("Hello", "cut off")
        user.type("/bye\r")
        assert user.leaves() == 0


def test_markdown_is_rendered_at_a_terminal_with_colors(person):
    with person("-n", "40", NO_COLOR="") as user:
        user.sees(PROMPT)
        shown = user.enters("Hello", "cut off")
        user.type("/exit\r")
        assert user.leaves() == 0
    assert "\x1b[2m" in shown  # the dim line


def test_what_is_typed_during_an_answer_is_not_shown_in_it_and_comes_next(person):
    with person("-n", "2000") as user:
        user.sees(PROMPT)
        user.type("Hello\r")
        user.sees(r"\x1b\[\?2004l(?s:.){40}")
        user.type("/exit\r")
        assert "/exit" not in user.sees("cut off")
        assert user.leaves() == 0


def test_run_at_a_terminal_stops_at_ctrl_c(home, endless):
    with Person(
        sys.executable, "-m", "mlxarch", "run", endless, "--no-loop-guard", "Hello", NO_COLOR="1"
    ) as user:
        user.sees(r"(?s:.){30}")
        user.type("\x03")
        assert user.leaves() == 130
        assert "Traceback" not in user.shown


def test_lines_of_a_pipe_are_questions(invoke, tiny, tmp_path):
    file = tmp_path / "talk.json"
    script = f'One\n\n"""Two\nlines"""\n/set max_tokens 3\nThree\n/save {file}\n'
    result = invoke("chat", tiny, "-n", "5", "-s", "Be brief", input=script)
    assert result.exit_code == 0, result.stderr
    messages = json.loads(file.read_text())["messages"]
    assert [message["content"] for message in messages if message["role"] == "user"] == [
        "One",
        "Two\nlines",
        "Three",
    ]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert [len(answer) for answer in answers] == [5, 5, 3]
    shown = "".join(answer.replace("\x1b", "␛").rstrip("\n") + "\n" for answer in answers)
    assert result.stdout == shown
    assert ">>>" not in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("/nonsense\nOne\n", 2),
        ("x" * 9000 + "\nOne\n", 1),
        ("/load /nowhere\n", 2),
        ("", 0),
        ("/exit\nOne\n", 0),
    ],
)
def test_a_script_ends_at_its_first_mistake(invoke, tiny, script, code):
    result = invoke("chat", tiny, "-n", "5", input=script)
    assert (result.exit_code, result.stdout) == (code, "")


def test_a_base_model_is_announced_and_continues(person, tiny_base):
    with person("-n", "3", model=tiny_base) as user:
        user.sees(r"no\s+chat\s+template\s+and\s+continues\s+your\s+text")
        user.sees(PROMPT)
        user.enters("Once upon", "cut off")
        user.enters("/system Be brief", "error: .*no chat template")
        user.type("\x04")
        assert user.leaves() == 0


def test_a_history_that_cannot_be_written_is_no_obstacle(person, home):
    home.mkdir(parents=True)
    (home / "state").write_text("a file in the way")
    with person("-n", "2") as user:
        user.sees("the input history is not kept")
        user.sees(PROMPT)
        user.enters("Hello", "cut off")
        user.type("\x04")
        assert user.leaves() == 0


def test_what_is_no_text_is_refused_as_by_run(invoke, tiny):
    ended = invoke("chat", tiny, "-n", "2", input=b"Hi\n\xff\xfe\n")
    assert ended.exit_code == 2
    assert "standard input, line 2, is no text in UTF-8: byte 0 is 0xff" in ended.stderr


def test_a_path_is_a_question_and_no_command(invoke, tiny):
    ended = invoke("chat", tiny, "-n", "3", input="/usr/bin is a folder\n")
    assert ended.exit_code == 0 and len(ended.stdout.strip("\n")) == 3


def test_raw_shows_the_answer_as_it_came_and_model_the_model(invoke, tiny):
    ended = invoke("chat", tiny, "-n", "5", input="One\n/raw\n/model\n")
    first, again = ended.stdout.splitlines()
    assert ended.exit_code == 0 and first == again
    assert "<LanguageModel tiny: llama, 2 layers" in ended.stderr
    other = invoke("chat", tiny, input="/model qwen3-4b\n")
    assert other.exit_code == 2 and "`mlxarch chat qwen3-4b`" in other.stderr

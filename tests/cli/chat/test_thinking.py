"""Thinking on the command line: dim on a terminal, apart from the answer, and not in the history."""

import io
import json
import sys

import pytest
from tiny_chat import TEMPLATE, make_chat_model, script

import mlxarch
from mlxarch.cli import render
from mlxarch.cli.chat.conversation import Conversation
from mlxarch.cli.chat.receive import receive_answer
from mlxarch.cli.render import NullWriter
from mlxarch.errors import InvalidInput
from mlxarch.generation.answer import Piece
from mlxarch.generation.sampling import Sampling
from mlxarch.generation.timings import Timings

STOP = "<|stop|>"
FIRST_MARK = 100  # its id: the first token behind those that every tiny chat model has
SWITCH = (
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
HARMONY = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>"]
HARMONY_TEMPLATE = (
    "<|start|>system<|message|>{{ reasoning_effort | default('medium') }}<|end|>"
    "{% for message in messages %}<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>{% endfor %}"
    "<|start|>assistant"
)
THOUGHT = "<think>\nlet me see\n</think>\n\nIt is 4." + STOP
CHANNELS = f"<|channel|>analysis<|message|>let me see<|end|><|start|>assistant<|channel|>final<|message|>It is 4.{STOP}"


@pytest.fixture(scope="session")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with tags, and a switch for them."""
    marks = {STOP: True, "<think>": False, "</think>": False}
    folder = tmp_path_factory.mktemp("models") / "thinker"
    return str(
        make_chat_model(folder, template=TEMPLATE + SWITCH, marks=marks, eos_token_id=FIRST_MARK)
    )


@pytest.fixture(scope="session")
def channelled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with harmony's channels, and levels of effort."""
    marks = {STOP: True} | dict.fromkeys(HARMONY, True)
    folder = tmp_path_factory.mktemp("models") / "channelled"
    return str(
        make_chat_model(folder, template=HARMONY_TEMPLATE, marks=marks, eos_token_id=FIRST_MARK)
    )


@pytest.fixture(params=["tags", "channels"])
def model(request: pytest.FixtureRequest, monkeypatch, thinker, channelled) -> str:
    """A model that thinks before it says that it is 4."""
    path, answer = (thinker, THOUGHT) if request.param == "tags" else (channelled, CHANNELS)
    script(monkeypatch, path, answer)
    return path


# The library


def test_a_result_and_its_pieces_hold_thinking_and_answer_apart(model):
    loaded, messages = mlxarch.load(model), [{"role": "user", "content": "2+2?"}]
    result = loaded.generate(messages)
    assert (result.thinking, result.text, result.finish_reason) == (
        "let me see",
        "It is 4.",
        "stop",
    )
    pieces = list(loaded.stream(messages))
    assert [piece.token for piece in pieces if piece.token is not None] == result.tokens
    for kind, text in ((True, "let me see"), (False, "It is 4.")):
        assert "".join(piece.text for piece in pieces if piece.thinking is kind) == text
    assert (
        all(piece.finish_reason is None for piece in pieces[:-1])
        and pieces[-1].finish_reason == "stop"
    )


def test_stop_strings_match_the_answer_alone(model):
    loaded, messages = mlxarch.load(model), [{"role": "user", "content": "2+2?"}]
    result = loaded.generate(messages, stop=["e", "see"])
    assert (result.thinking, result.text, result.finish_reason) == (
        "let me see",
        "It is 4.",
        "stop",
    )
    assert FIRST_MARK in result.tokens, "it ended by itself"
    stopped = loaded.generate(messages, stop=[" is"])
    assert (stopped.thinking, stopped.text, stopped.finish_reason) == ("let me see", "It", "stop")
    assert FIRST_MARK not in stopped.tokens


def test_what_is_cut_off_within_the_thinking_has_no_answer(model):
    result = mlxarch.load(model).generate([{"role": "user", "content": "2+2?"}], max_tokens=16)
    assert (result.text, result.finish_reason) == ("", "length")
    assert result.thinking and "let me see".startswith(result.thinking)


def test_a_prompt_that_opens_the_thinking_is_thinking_from_the_start(thinker, monkeypatch):
    script(monkeypatch, thinker, "so it is</think>\n4" + STOP)
    result = mlxarch.load(thinker).generate("why<think>\n")
    assert (result.thinking, result.text) == ("so it is", "4")


def test_each_row_of_a_batch_has_thinking_of_its_own(thinker):
    prompts = ["a<think>", "a"]
    opened, plain = mlxarch.load(thinker).generate_batch(prompts, max_tokens=5)
    assert (opened.text, plain.thinking) == ("", "")
    assert opened.thinking and plain.text


# mlxarch run


def test_the_answer_alone_is_on_standard_output(invoke, model):
    result = invoke("run", model, "2+2?")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "It is 4.\n", "")


def test_json_has_both(invoke, model):
    report = json.loads(invoke("run", model, "2+2?", "--json").stdout)
    assert (report["text"], report["thinking"]) == ("It is 4.", "let me see")


@pytest.mark.parametrize(
    ("arguments", "prompt", "warning"),
    [
        ([], "<|user|>Hi<|assistant|>", ""),
        (["--think"], "<|user|>Hi<|assistant|>", ""),
        (["--no-think"], "<|user|>Hi<|assistant|><think>\n\n</think>\n\n", ""),
        (["--effort", "low"], "<|user|>Hi<|assistant|>", "knows no levels of effort"),
    ],
)
def test_the_switch_reaches_the_template_or_is_missed_aloud(
    invoke, thinker, monkeypatch, arguments, prompt, warning
):
    prompts = script(monkeypatch, thinker, "4" + STOP)
    result = invoke("run", thinker, "Hi", *arguments)
    assert (result.exit_code, result.stdout, prompts) == (0, "4\n", [prompt])
    assert warning in result.stderr and bool(result.stderr) is bool(warning)


@pytest.mark.parametrize(
    ("arguments", "effort", "warning"),
    [([], "medium", ""), (["--effort", "high"], "high", ""), (["--think"], "medium", ""),
     (["--no-think"], "low", "always thinks: it is asked for low effort instead")],
)  # fmt: skip
def test_the_effort_reaches_the_template_of_gpt_oss(
    invoke, channelled, monkeypatch, arguments, effort, warning
):
    prompts = script(monkeypatch, channelled, CHANNELS)
    result = invoke("run", channelled, "Hi", *arguments)
    assert result.stdout == "It is 4.\n" and f"<|message|>{effort}<|end|>" in prompts[0]
    assert warning in result.stderr and bool(result.stderr) is bool(warning)


@pytest.mark.parametrize("option", [["--think"], ["--no-think"], ["--effort", "low"]], ids=" ".join)
def test_a_model_without_a_switch_answers_all_the_same_and_says_so(invoke, tiny, tiny_base, option):
    for path in (tiny, tiny_base):
        plain = invoke("run", path, "Hi", "-n", "5")
        result = invoke("run", path, "Hi", "-n", "5", *option)
        assert (result.exit_code, result.stdout) == (0, plain.stdout)
        assert "its chat template has no switch for that" in result.stderr
        assert "switch" not in plain.stderr


@pytest.mark.parametrize(
    "arguments", [["--think", "--raw"], ["--effort", "low", "--raw"], ["--effort", "extreme"]]
)
def test_what_cannot_be_meant_is_wrong_usage(invoke, thinker, arguments):
    result = invoke("run", thinker, "Hi", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")


def test_an_answer_that_was_all_thinking_is_reported_as_such(invoke, model):
    result = invoke("run", model, "2+2?", "-n", "16")
    assert result.stdout == "" and "the thinking is cut off" in result.stderr


# mlxarch chat


def test_thinking_is_not_kept_in_the_history(invoke, model, tmp_path, monkeypatch):
    prompts = script(monkeypatch, model, CHANNELS if "channelled" in model else THOUGHT)
    file = tmp_path / "talk.json"
    result = invoke("chat", model, input=f"2+2?\nand 3+3?\n/save {file}\n")
    assert (result.exit_code, result.stdout) == (0, "It is 4.\n" * 2), result.stderr
    assert "It is 4." in prompts[1] and "let me see" not in prompts[1] and "think" not in prompts[1]
    messages = json.loads(file.read_text())["messages"]
    assert [message["content"] for message in messages] == [
        "2+2?",
        "It is 4.",
        "and 3+3?",
        "It is 4.",
    ]


def test_a_chat_is_told_to_think_by_options_and_by_set(invoke, thinker, monkeypatch):
    prompts = script(monkeypatch, thinker, "4" + STOP)
    lines = "a\n/set think on\nb\n/set think off\nc\n/set think none\nd\n/set effort high\n/set think on\n/set\n"
    result = invoke("chat", thinker, "--no-think", input=lines)
    assert result.exit_code == 0, result.stderr
    assert [prompt.endswith("</think>\n\n") for prompt in prompts] == [True, False, True, False]
    assert result.stderr.count("no switch for that") == 1
    assert "think               on" in result.stderr and "effort              high" in result.stderr


def test_a_chat_warns_before_it_begins(invoke, tiny):
    result = invoke("chat", tiny, "--think", "--effort", "low", input="")
    assert result.stderr.count("its chat template has no switch for that") == 2


def test_a_flag_for_the_system_prompt_is_sent_and_not_saved(invoke, tmp_path, monkeypatch):
    template = "{% if '/no_think' in messages[0].content %}{% endif %}" + TEMPLATE
    path = make_chat_model(
        tmp_path / "flagged", template=template, marks={STOP: True}, eos_token_id=FIRST_MARK
    )
    prompts, file = script(monkeypatch, path, "4" + STOP), tmp_path / "talk.json"
    assert invoke("run", str(path), "Hi", "-s", "Be brief", "--no-think").exit_code == 0
    assert invoke("chat", str(path), "--no-think", input=f"Hi\n/save {file}\n").exit_code == 0
    assert prompts == [
        "<|system|>Be brief\n/no_think<|user|>Hi<|assistant|>",
        "<|system|>/no_think<|user|>Hi<|assistant|>",
    ]
    assert [message["role"] for message in json.loads(file.read_text())["messages"]] == [
        "user",
        "assistant",
    ]


def test_the_settings_are_checked_saved_and_loaded(thinker, tmp_path, home):
    loaded = mlxarch.load(thinker)
    talk = Conversation(loaded, thinker, Sampling(), None, 5)
    for name, text in (("think", "maybe"), ("effort", "extreme"), ("effort", "")):
        with pytest.raises(InvalidInput, match=f"{name} must be"):
            talk.set(name, text)
    talk.set("think", "OFF")
    talk.set("effort", "high")
    file = talk.save(tmp_path / "talk.json")
    other = Conversation(loaded, thinker, Sampling(), None, 5)
    other.load(file)
    assert (other.think, other.effort) == (False, "high")
    for name, value in (("think", "on"), ("think", 1), ("effort", "extreme"), ("effort", 3)):
        record = json.loads(file.read_text())
        record["settings"][name] = value
        (changed := tmp_path / "changed.json").write_text(json.dumps(record))
        with pytest.raises(InvalidInput, match=f"{name} must be"):
            other.load(changed)
    assert (other.think, other.effort) == (False, "high")


# The terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(
    patch: pytest.MonkeyPatch,
    pieces: list[tuple[str, bool]],
    *,
    color: bool = True,
    hidden: bool = False,
) -> str:
    """Both streams, as one terminal shows them."""
    with patch.context() as stage:
        stage.setenv("TERM", "xterm")
        stage.setenv("NO_COLOR", "" if color else "1")
        screen = Terminal()
        stage.setattr(sys, "stdout", screen)
        stage.setattr(sys, "stderr", screen)
        stream = (Piece(text, 1, None, Timings(), thinking) for text, thinking in pieces)
        answer = receive_answer(
            stream, render.make_answer_writer(plain=True), render.make_thinking_writer(hidden)
        )
    assert (answer.thinking, answer.text) == tuple(
        "".join(text for text, thinking in pieces if thinking is kind) for kind in (True, False)
    )
    return screen.getvalue()


THINKS = [("hm", True), (" so", True), ("4", False), ("!", False)]


def test_thinking_is_dim_on_a_terminal_and_stands_before_the_answer(monkeypatch):
    assert shown(monkeypatch, THINKS) == "\x1b[2mhm\x1b[0m\x1b[2m so\x1b[0m\n\n4!\n"


def test_without_colors_words_tell_thinking_and_answer_apart(monkeypatch):
    assert shown(monkeypatch, THINKS, color=False) == "(thinking)\nhm so\n(answer)\n4!\n"


def test_thinking_can_be_hidden(monkeypatch):
    assert shown(monkeypatch, THINKS, hidden=True) == "4!\n"


def test_an_answer_without_thinking_looks_as_ever(monkeypatch):
    assert shown(monkeypatch, [("", False), ("4", False), ("!", False)]) == "4!\n"


def test_thinking_after_a_part_of_the_answer_begins_a_new_line(monkeypatch):
    pieces = [("I look.", False), ("hm\n", True), ("4", False)]
    assert shown(monkeypatch, pieces) == "I look.\n\x1b[2mhm\n\x1b[0m\n4\n"


def test_escape_sequences_in_the_thinking_do_not_reach_the_terminal(monkeypatch):
    assert (
        shown(monkeypatch, [("\x1b[2J\x07", True)], color=False) == "(thinking)\n␛[2J␇\n(answer)\n"
    )


def test_thinking_is_for_terminals(monkeypatch, capsys):
    assert isinstance(render.make_thinking_writer(), NullWriter)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert isinstance(render.make_thinking_writer(), render.ThinkingWriter) and isinstance(
        render.make_thinking_writer(True), NullWriter
    )

"""A conversation: turns, settings, and the file in which it is kept."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlxarch
from mlxarch.cli.chat import saved_chats
from mlxarch.cli.chat.conversation import Conversation
from mlxarch.cli.chat.receive import STOPPED, receive_answer
from mlxarch.cli.render import NullWriter
from mlxarch.errors import ContextLengthError, InvalidInput, OutputError
from mlxarch.generation.answer import Piece
from mlxarch.generation.sampling import Sampling
from mlxarch.generation.timings import Timings


@pytest.fixture
def talk(tiny, home) -> Conversation:
    return Conversation(mlxarch.load(tiny), tiny, Sampling(), "Be brief", 6)


def saved(talk: Conversation, folder: Path, **changes: object) -> Path:
    path = folder / "changed.json"
    record = {
        "version": 1,
        "model": "m",
        "saved": "2026-01-01",
        "settings": talk.settings(),
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
    }
    path.write_text(json.dumps(record | changes))
    return path


def test_a_turn_computes_only_what_is_new_and_changes_no_answer(talk):
    first = talk.ask("One", NullWriter())
    second = talk.ask("Two", NullWriter())
    assert first.timings.reused_tokens == 0
    held = (
        first.timings.prompt_tokens + first.timings.generated_tokens - 1
    )  # the last one was never fed
    assert second.timings.reused_tokens == held
    talk.messages.pop()
    fresh = talk.model.generate(talk.prompt(), max_tokens=6)
    assert second.text == fresh.text


def test_undo_and_clear_forget_and_retry_asks_the_same(talk):
    first = talk.ask("One", NullWriter()).text
    second = talk.ask("Two", NullWriter()).text
    assert talk.retry(NullWriter()).text == second and len(talk.messages) == 4
    assert talk.undo() == "Two"
    assert [message.content for message in talk.messages] == ["One", first]
    assert talk.ask("Two", NullWriter()).text == second
    talk.clear()
    assert talk.messages == [] and talk.system == "Be brief" and talk.undo() is None
    assert talk.ask("One", NullWriter()).text == first
    talk.clear()
    with pytest.raises(InvalidInput, match="no question yet"):
        talk.retry(NullWriter())


def test_a_question_that_fails_is_forgotten_and_the_chat_goes_on(talk):
    talk.ask("One", NullWriter())
    before = list(talk.messages)
    with pytest.raises(ContextLengthError):
        talk.ask("long " * 2000, NullWriter())
    assert talk.messages == before
    assert talk.ask("Two", NullWriter()).timings.reused_tokens > 0


def test_an_interrupt_before_the_first_token_keeps_what_was(talk, monkeypatch):
    expected = [talk.ask(text, NullWriter()).text for text in ("One", "Two")][1]
    before = list(talk.messages)

    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(talk.model.model, "head", interrupted)
        with pytest.raises(KeyboardInterrupt):
            talk.ask("Three", NullWriter())
        with pytest.raises(KeyboardInterrupt):
            talk.retry(NullWriter())
    assert talk.messages == before
    assert talk.retry(NullWriter()).text == expected


def pieces(interrupt_at: int, closed: list[int]) -> Iterator[Piece]:
    try:
        for index in range(9):
            if index == interrupt_at:
                signal.raise_signal(signal.SIGINT)
            yield Piece(str(index), index, "length" if index == 8 else None, Timings())
    finally:
        closed.append(1)


def test_ctrl_c_ends_an_answer_between_two_tokens_and_keeps_its_text():
    closed: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    answer = receive_answer(pieces(3, closed), NullWriter())
    assert (answer.text, answer.finish_reason, closed) == ("0123", STOPPED, [1])
    assert signal.getsignal(signal.SIGINT) is before
    whole = receive_answer(pieces(99, closed), NullWriter())
    assert (whole.text, whole.finish_reason) == ("012345678", "length")


def test_ctrl_c_before_the_first_token_and_twice_stops_at_once():
    closed: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        receive_answer(pieces(0, closed), NullWriter())

    def twice() -> Iterator[Piece]:
        yield Piece("a", 1, None, Timings())
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        yield Piece("b", 2, None, Timings())

    with pytest.raises(KeyboardInterrupt):
        receive_answer(twice(), NullWriter())
    assert closed == [1]


def test_settings_are_read_checked_and_used(talk):
    for name, text, value in [
        ("temperature", "0.5", 0.5),
        ("top_k", "40", 40),
        ("top_p", "0.9", 0.9),
        ("min_p", "0.05", 0.05),
        ("repetition_penalty", "1.1", 1.1),
        ("seed", "7", 7),
        ("max_tokens", "3", 3),
        ("stop", "'a b' c", ["a b", "c"]),
    ]:
        talk.set(name, text)
        assert talk.settings()[name] == value
    assert talk.sampling == Sampling(
        temperature=0.5, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.1, seed=7
    )
    talk.set("stop", "none")
    assert talk.ask("Hi", NullWriter()).timings.generated_tokens == 3
    for name in ("seed", "max_tokens"):
        talk.set(name, "none")
        assert talk.settings()[name] is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("temperature", "hot"), ("temperature", "-1"), ("temperature", "nan"), ("temperature", "none"),
        ("top_k", "1.5"), ("top_p", "0"), ("min_p", "2"), ("seed", "-1"), ("max_tokens", "0"),
        ("stop", "''"), ("stop", "'a"),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_changes_nothing(talk, name, text):
    before = talk.settings()
    with pytest.raises(InvalidInput, match=name):
        talk.set(name, text)
    assert talk.settings() == before


def test_a_saved_conversation_comes_back_whole(talk, tiny, tmp_path):
    talk.ask("One\nof two lines \x1b[31m", NullWriter())
    talk.messages[-1].stopped = True
    talk.set("stop", "xyz")
    path = talk.save(tmp_path / "folder" / "talk.json")
    assert os.stat(path).st_mode & 0o777 == 0o600
    record = json.loads(path.read_text())
    assert record["version"] == 1 and record["model"] == tiny
    assert [message["role"] for message in record["messages"]] == ["system", "user", "assistant"]
    assert record["messages"][2]["stopped"] is True

    other = Conversation(talk.model, tiny, Sampling(temperature=1.0), None, None)
    other.load(path)
    assert (other.messages, other.system, other.settings()) == (
        talk.messages,
        talk.system,
        talk.settings(),
    )
    assert other.ask("Two", NullWriter()).text == talk.ask("Two", NullWriter()).text


def test_saving_overwrites_its_own_file_and_no_other(talk, tmp_path):
    path = talk.save(tmp_path / "a.json")
    talk.ask("One", NullWriter())
    assert talk.save(None) == path and len(json.loads(path.read_text())["messages"]) == 3
    foreign = tmp_path / "b.json"
    foreign.write_text("precious")
    with pytest.raises(OutputError, match="exists"):
        talk.save(foreign)
    assert foreign.read_text() == "precious"
    talk.clear()
    named = talk.save(None)
    assert named.parent == saved_chats.chats_folder() and saved_chats.find_chat(named.stem) == named
    with pytest.raises(OutputError, match="cannot be written"):
        talk.save(foreign / "below.json")


def test_a_save_that_fails_leaves_the_old_file(talk, tmp_path, monkeypatch):
    path = talk.save(tmp_path / "a.json")
    before = path.read_bytes()
    talk.ask("One", NullWriter())

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OutputError, match="No space left"):
        talk.save(None)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ""] == ["a.json"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"version": 2}, "version 2 is not known"),
        ({"version": "1"}, "version .* is not known"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "no saved conversation"),
        ({"messages": [{"role": "user", "content": 7}]}, "no saved conversation"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "has no answer"),
        (
            {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]},
            "take turns",
        ),
        ({"messages": "none"}, "no saved conversation"),
        ({"settings": {"temperature": -1}}, "temperature"),
        ({"settings": {"temperature": "1"}}, "temperature"),
        ({"settings": {"max_tokens": True}}, "max_tokens"),
        ({"settings": {"stop": [""]}}, "stop"),
        ({"settings": {"warmth": 1}}, "'warmth' is not known"),
        ({"model": None}, "no saved conversation"),
    ],
    ids=str,
)
def test_a_file_that_is_not_sound_is_refused_and_changes_nothing(talk, tmp_path, changes, says):
    talk.ask("One", NullWriter())
    before = (list(talk.messages), talk.system, talk.settings(), talk.file)
    talk.load(saved(talk, tmp_path))  # the same file without the fault
    talk.messages, talk.system, talk.file = list(before[0]), before[1], before[3]
    with pytest.raises(InvalidInput, match=says):
        talk.load(saved(talk, tmp_path, **changes))
    assert (talk.messages, talk.system, talk.settings(), talk.file) == before


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"version": 1}']
)
def test_what_is_no_conversation_is_refused(talk, tmp_path, data):
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(InvalidInput, match=r"x\.json"):
        talk.load(tmp_path / "x.json")


def test_files_that_are_missing_odd_or_too_large_are_refused(talk, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    large = tmp_path / "large.json"
    large.touch()
    os.truncate(large, saved_chats.MAX_FILE_BYTES + 1)
    for path in (tmp_path / "missing", tmp_path / "pipe", tmp_path, large):
        with pytest.raises(InvalidInput, match=str(path)):
            talk.load(path)
    with pytest.raises(InvalidInput, match="~nobody"):
        saved_chats.find_chat("~nobody-of-this-name/x")


def test_a_base_model_continues_the_text_so_far(tiny_base, home):
    talk = Conversation(mlxarch.load(tiny_base), "base", Sampling(), None, 6)
    first = talk.ask("Once upon", NullWriter()).text
    second = talk.ask("And then", NullWriter()).text
    assert first == talk.model.generate("Once upon", max_tokens=6).text
    assert second == talk.model.generate(f"Once upon{first}\nAnd then", max_tokens=6).text
    with pytest.raises(InvalidInput, match="no chat template"):
        talk.set_system("Be brief")

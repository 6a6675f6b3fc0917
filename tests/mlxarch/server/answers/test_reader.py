"""Events from outputs of the engine, without an engine."""

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest
from house import ROOT

from mlxarch import Tokenizer
from mlxarch.engine.request import PromptReport, RequestTimings, RowOutput
from mlxarch.errors import NonFiniteLogits
from mlxarch.generation.logprobs import TokenLogprobs
from mlxarch.server.answers.collected import collect
from mlxarch.server.answers.events import Delta, End, PromptRead
from mlxarch.server.answers.reader import OutputReader


@pytest.fixture
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny)


def test_logprobs_wait_for_the_text_of_their_tokens(tokenizer):
    reader = OutputReader(tokenizer, [1], ["xyz"])
    events = []
    for token in tokenizer.encode("axyb"):
        events += reader.read(RowOutput((token,), (TokenLogprobs(token, -1.0),)))
    deltas = [event for event in events if isinstance(event, Delta)]
    assert [event.text for event in deltas] == ["a", "xyb"]
    assert [len(event.logprobs) for event in deltas] == [1, 3]


def test_a_stop_string_is_reported_and_nothing_follows_it(tokenizer):
    reader = OutputReader(tokenizer, [1], ["xy", "q"])
    tokens = tuple(tokenizer.encode("axyb"))
    *deltas, end = reader.read(RowOutput(tokens))
    assert "".join(each.text for each in deltas if isinstance(each, Delta)) == "a"
    assert isinstance(end, End) and end.timings is not None
    assert (end.reason, end.stop_sequence, end.usage) == ("stop", "xy", reader.usage)
    assert end.timings.decode_seconds > 0
    assert reader.usage.answer == 3
    assert list(reader.read(RowOutput(tokens, finish_reason="length"))) == []


def test_thinking_is_counted_and_has_no_logprobs(tokenizer):
    reader = OutputReader(tokenizer, tokenizer.encode("<think>"), [])
    tokens = tokenizer.encode("ab</think>c")
    entries = tuple(TokenLogprobs(token, -1.0) for token in tokens)
    timings = RequestTimings(0.0, 0.0, 0.0)
    report = PromptReport(1, cached_tokens=1)
    output = RowOutput(tuple(tokens), entries, "length", prompt=report, timings=timings)
    first, *between, end = reader.read(output)
    deltas = [each for each in between if isinstance(each, Delta)]
    assert first == PromptRead(report)
    assert [(each.text, each.thinking) for each in deltas] == [
        ("a", True),
        ("b", True),
        ("c", False),
    ]
    assert [entry.token for entry in deltas[-1].logprobs] == tokens[-1:]
    assert end == End("length", None, reader.usage, timings)
    assert (reader.usage.cached, reader.usage.thinking, reader.usage.answer) == (1, 3, 4)


@pytest.mark.parametrize("continues", [False, True])
def test_a_whole_answer_is_split_where_thinking_was_closed_without_being_opened(
    tokenizer, continues
):
    text = "plan\n</think>\n\nanswer"
    reader = OutputReader(tokenizer, tokenizer.encode("user:"), [], continues=continues)

    class Finished:
        count = 1
        readers = (reader,)

        async def events(self):
            output = RowOutput(tuple(tokenizer.encode(text)), finish_reason="stop")
            for event in reader.read(output):
                yield 0, event

    [answer] = asyncio.run(collect(cast(Any, Finished())))
    # a text that goes on is given as it is
    wanted = ("", text) if continues else ("plan", "answer")
    assert (answer.thinking, answer.text) == wanted


def test_an_error_of_the_engine_is_raised(tokenizer):
    reader = OutputReader(tokenizer, [1], [])
    with pytest.raises(NonFiniteLogits):
        list(reader.read(RowOutput(finish_reason="error", error=NonFiniteLogits("nan"))))


def test_a_character_that_the_limit_cuts_is_left_out():
    tokenizer = Tokenizer.from_folder(ROOT / "tests/fixtures/tokenizers/qwen3")
    tokens = tuple(tokenizer.encode("a日")[:2])
    assert [tokenizer.bytes_of(token) for token in tokens] == [b"a", "日".encode()[:2]]

    def text(reason: Any) -> str:
        reader = OutputReader(tokenizer, [1], [], continues=True)
        events = reader.read(RowOutput(tokens, finish_reason=reason))
        return "".join(event.text for event in events if isinstance(event, Delta))

    assert text("length") == "a"
    assert text("stop") == "a\N{REPLACEMENT CHARACTER}"

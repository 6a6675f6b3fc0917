"""Events of a response with reasoning, without a model."""

from pathlib import Path

import pytest

from mlxarch import Tokenizer
from mlxarch.server.answers.events import Delta, End, Usage
from mlxarch.server.api.openai.response_writer import ResponseWriter


@pytest.fixture
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny)


def written(tokenizer, **options):
    writer = ResponseWriter({"id": "r", "output": []}, tokenizer, **options)
    events = writer.begin()
    events += writer.add(Delta("why", thinking=True))
    events += writer.add(Delta("so"))
    events += writer.finish(End("stop"), Usage(1, 0, 2, 1))
    return events


def test_reasoning_is_an_item_before_the_message(tokenizer):
    events = written(tokenizer, summarize=False, seal=False)
    reasoning, message = events[-1]["response"]["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "why"}]
    assert reasoning["summary"] == []
    assert message["content"][0]["text"] == "so"
    assert [event["output_index"] for event in events if "output_index" in event] == [0] * 4 + [
        1
    ] * 6
    assert events[-1]["type"] == "response.completed"


def test_reasoning_is_a_summary_where_one_is_asked_for(tokenizer):
    events = written(tokenizer, summarize=True, seal=True)
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[2:7] == [
        "output_item.added",
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
    ]
    reasoning = events[-1]["response"]["output"][0]
    assert reasoning["summary"] == [{"type": "summary_text", "text": "why"}]
    assert reasoning["encrypted_content"] == "d2h5"

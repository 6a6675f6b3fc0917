"""LangChain's ChatOpenAI against a real process: answers, streams, tools, schemas and usage."""

from typing import Literal

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from live_server import LiveServer
from pydantic import BaseModel

NO_THINKING = {100: -100}  # bias of <think>, with which random weights like to begin


class Answer(BaseModel):
    """An answer."""

    ok: bool


def weather(days: Literal[1, 2]) -> str:
    """The weather.

    Args:
        days: number of days.
    """
    return f"{days} days"


def chat(server: LiveServer, **fields) -> ChatOpenAI:
    url = f"http://127.0.0.1:{server.port}/v1"
    given = {"model": "tiny", "temperature": 0, "max_completion_tokens": 5, "max_retries": 0}
    return ChatOpenAI(base_url=url, api_key="none", **(given | fields))  # pyright: ignore[reportArgumentType]


def test_an_answer_and_its_stream_are_equal(server: LiveServer):
    model = chat(server)
    whole = model.invoke("hi")
    assert isinstance(whole, AIMessage)
    assert len(whole.content) == 5
    assert whole.response_metadata["finish_reason"] == "length"
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == 5
    total: AIMessageChunk | None = None
    for chunk in model.stream("hi", stream_usage=True):
        assert isinstance(chunk, AIMessageChunk)
        total = chunk if total is None else total + chunk
    assert total is not None
    assert total.content == whole.content
    assert total.usage_metadata is not None
    assert total.usage_metadata["output_tokens"] == 5
    assert [each.content for each in model.batch(["hi", "ho"])][0] == whole.content


def test_a_tool_is_called_and_its_result_read(server: LiveServer):
    model = chat(server, max_completion_tokens=200, logit_bias=NO_THINKING)
    bound = model.bind_tools([weather], tool_choice="weather", parallel_tool_calls=False)
    message = bound.invoke("hi")
    assert isinstance(message, AIMessage)
    [call] = message.tool_calls
    assert call["name"] == "weather"
    assert call["args"]["days"] in (1, 2)
    result = ToolMessage(weather(1), tool_call_id=call["id"])
    assert chat(server).invoke([HumanMessage("hi"), message, result]).content


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_a_schema_is_held(server: LiveServer, method):
    model = chat(server, max_completion_tokens=200, logit_bias=NO_THINKING)
    model = model.with_structured_output(Answer, method=method)
    assert isinstance(model.invoke("hi"), Answer)


def test_responses_and_logprobs(server: LiveServer):
    answer = chat(server, use_responses_api=True).invoke("hi")
    assert answer.text == chat(server).invoke("hi").content
    told = chat(server, logprobs=True, top_logprobs=2).invoke("hi")
    assert len(told.response_metadata["logprobs"]["content"]) == 5

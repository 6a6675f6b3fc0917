"""Chat completions as clients see them."""

import json
import time
from http.client import HTTPConnection

import pytest
from house import ROOT
from live_server import LiveServer

from mlxarch import Tokenizer
from mlxarch.server.api.openai.chat import token_object


def text_of(events, index=0, key="content"):
    chunks = [each for event in events[:-1] for each in event["choices"]]
    return "".join(each["delta"].get(key) or "" for each in chunks if each["index"] == index)


def test_an_answer_has_the_shape_of_the_api(server: LiveServer):
    reply = server.chat()
    assert reply.status == 200
    answer = reply.json
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "tiny"
    [choice] = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert len(choice["message"]["content"]) == 6
    assert choice["message"]["refusal"] is None
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    usage = answer["usage"]
    assert usage["prompt_tokens"] == 4  # <|user|> h i <|assistant|>
    assert usage["completion_tokens"] == 6
    assert usage["total_tokens"] == 10
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 0
    assert reply.headers["x-request-id"] == reply.headers["request-id"]
    assert "warnings" not in answer


def test_a_stream_holds_the_same_answer(server: LiveServer):
    whole = server.chat().json["choices"][0]["message"]["content"]
    reply = server.chat(stream=True)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.events
    assert events[-1] == "[DONE]"
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text_of(events) == whole
    reasons = [event["choices"][0]["finish_reason"] for event in events[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert len({(event["id"], event["created"], event["model"]) for event in events[:-1]}) == 1
    assert not [event for event in events[:-1] if "usage" in event]


def test_usage_is_the_last_chunk_when_asked_for(server: LiveServer):
    events = server.chat(stream=True, stream_options={"include_usage": True}).events
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["completion_tokens"] == 6
    assert all(event["usage"] is None for event in events[:-2])


def test_several_answers_have_their_own_seeds(server: LiveServer):
    answer = server.chat(n=3, seed=15, temperature=1.0).json
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert answer["usage"]["completion_tokens"] == 18
    assert answer["usage"]["prompt_tokens"] == 4
    again = server.chat(n=2, seed=16, temperature=1.0).json
    assert [choice["message"]["content"] for choice in again["choices"]] == texts[1:]
    events = server.chat(n=3, seed=15, temperature=1.0, stream=True).events
    assert [text_of(events, index) for index in range(3)] == texts


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(server: LiveServer):
    full = server.chat().json["choices"][0]["message"]["content"]
    reply = server.chat(stop=[full[3:5]])
    [choice] = reply.json["choices"]
    assert choice["message"]["content"] == full[: full.index(full[3:5])]
    assert choice["finish_reason"] == "stop"
    events = server.chat(stop=full[3:5], stream=True).events
    assert text_of(events) == choice["message"]["content"]


def test_logprobs_belong_to_the_tokens(server: LiveServer):
    [choice] = server.chat(logprobs=True, top_logprobs=2).json["choices"]
    content = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == choice["message"]["content"]
    for entry in content:
        assert entry["bytes"] == list(entry["token"].encode())
        best = entry["top_logprobs"]
        assert len(best) == 2
        assert best[0]["logprob"] >= best[1]["logprob"]
        assert entry["token"] == best[0]["token"]  # greedy
    events = server.chat(logprobs=True, top_logprobs=2, stream=True).events
    streamed = [
        entry
        for event in events[:-1]
        for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in content]


def test_thinking_is_kept_apart(server: LiveServer):
    message = server.chat(enable_thinking=True).json["choices"][0]["message"]
    assert message["content"] == ""
    assert message["reasoning_content"] == message["reasoning"]
    assert message["reasoning"]
    answer = server.chat(chat_template_kwargs={"enable_thinking": True}).json
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 6
    events = server.chat(enable_thinking=True, stream=True).events
    assert text_of(events, key="reasoning_content") == message["reasoning"]
    assert text_of(events) == ""
    assert "reasoning" not in server.chat(enable_thinking=False).json["choices"][0]["message"]


def test_levels_of_effort_that_a_model_lacks_are_told(server: LiveServer):
    [warning] = server.chat(reasoning_effort="low").json["warnings"]
    assert "no levels of effort" in warning


@pytest.mark.parametrize(
    ("fields", "param", "part"),
    [
        ({"frobnicate": 1}, "frobnicate", "--lenient"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": [{"role": "user", "content": "a", "x": 1}]}, "messages[0].x", "--lenient"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages[0].role", "king"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            "text only",
        ),
        ({"temperature": -1}, "temperature", ">= 0"),
        ({"temperature": True}, "temperature", "bool"),
        ({"max_tokens": 0}, "max_tokens", ">= 1"),
        ({"max_tokens": 1.5}, "max_tokens", "int"),
        ({"seed": 2**80}, "seed", "<="),
        ({"n": 17}, "n", "<= 16"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": ""}, "stop", "from 1"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "<= 20"),
        ({"logit_bias": {"1000000": 1}}, "logit_bias", "ids run from 0"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "ids run from 0"),
        ({"logit_bias": {"1": 1000}}, "logit_bias", "-100 to 100"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs", "no variable"),
        ({"functions": []}, "functions", "tools"),
        ({"modalities": ["audio"]}, "modalities", "text only"),
    ],
)
def test_a_wrong_field_is_named(server: LiveServer, fields, param, part):
    reply = server.chat(**fields)
    assert reply.status == 400
    error = reply.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert part in error["message"]


def test_what_does_not_fit_is_refused_with_the_numbers(server: LiveServer):
    error = server.chat(max_tokens=10**9).json["error"]
    assert error["code"] == "context_length_exceeded"
    assert "1280" in error["message"]
    assert "1000000000" in error["message"]
    assert server.chat("a" * 5000).json["error"]["code"] == "context_length_exceeded"


def test_a_model_that_is_not_served_is_not_found(server: LiveServer):
    for name in ("gpt-4", "/etc", "../../etc", "org/repo"):
        reply = server.chat(model=name)
        assert reply.status == 404
        assert reply.json["error"]["code"] == "model_not_found"
        assert name not in reply.json["error"]["message"]
    assert server.chat(model="tiny").status == 200


def test_a_client_that_leaves_frees_its_place(server: LiveServer):
    body = json.dumps({"messages": [{"role": "user", "content": "go"}], "max_tokens": 1200})
    for stream in (True, False):
        connection = HTTPConnection("127.0.0.1", server.port, timeout=30)
        text = body[:-1] + f', "stream": {str(stream).lower()}}}'
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", text, headers)
        if stream:
            connection.getresponse().read(10)
        else:
            assert server.chat().status == 200  # meanwhile it runs
        connection.close()
        assert server.chat().status == 200
    gone: list[str] = []
    deadline = time.monotonic() + 10
    while len(gone) < 2:  # the log is written, and read, a moment later
        assert time.monotonic() < deadline
        gone = [line for line in server.log if "end=client" in line]
    assert all(int(line.split("out=")[1].split()[0]) < 1200 for line in gone)


def test_thinking_ends_at_its_budget(server: LiveServer):
    def thinking(budget: int) -> tuple[str, str, dict]:
        answer = server.chat(
            enable_thinking=True, reasoning={"max_tokens": budget}, max_tokens=20
        ).json
        message = answer["choices"][0]["message"]
        return message["reasoning_content"], message["content"], answer["usage"]

    thought, text, usage = thinking(6)
    assert 0 < len(thought) <= 6
    assert text
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 7  # with the end mark
    assert len(thinking(19)[0]) > 6


def test_thinking_can_be_part_of_the_text(server: LiveServer):
    fields = {"enable_thinking": True, "reasoning": {"max_tokens": 4}, "max_tokens": 12}
    split = server.chat(**fields).json["choices"][0]["message"]
    expected = f"<think>\n{split['reasoning_content']}\n</think>\n\n{split['content']}"
    inline = server.chat(reasoning_format="none", **fields).json["choices"][0]["message"]
    assert inline["content"] == expected
    assert "reasoning_content" not in inline
    events = server.chat(reasoning_format="none", stream=True, **fields).events[:-1]
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content", "") for delta in deltas) == expected


def test_bytes_of_tokens_join_to_the_text_where_they_are_parts_of_characters():
    tokenizer = Tokenizer.from_folder(ROOT / "tests/fixtures/tokenizers/qwen3")
    entries = [token_object(tokenizer, token, -1.0) for token in tokenizer.encode("a日🎉")]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == "a日🎉"
    assert [entry["token"] for entry in entries][:2] == ["a", "\\xe6\\x97"]

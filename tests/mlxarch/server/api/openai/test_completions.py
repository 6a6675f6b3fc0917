"""Text completions, as evaluation harnesses ask for them."""

import pytest
from live_server import LiveServer


def complete(server: LiveServer, prompt, **fields):
    return server.post(
        "/v1/completions", {"prompt": prompt, "max_tokens": 4, "temperature": 0} | fields
    )


def test_every_form_of_a_prompt_is_answered(server: LiveServer):
    ids = server.post("/tokenize", {"content": "ab"}).json["tokens"]
    answer = complete(server, "ab").json
    assert answer["object"] == "text_completion"
    text = answer["choices"][0]["text"]
    assert len(text) == 4
    assert answer["choices"][0]["finish_reason"] == "length"
    assert complete(server, ids).json["choices"][0]["text"] == text
    for several in (["ab", "cd"], [ids, ids], ["ab", ids]):
        choices = complete(server, several).json["choices"]
        assert [choice["index"] for choice in choices] == [0, 1]
        assert choices[0]["text"] == text
    usage = complete(server, ["ab", "cde"]).json["usage"]
    assert usage["prompt_tokens"] == 5
    assert usage["completion_tokens"] == 8


def test_answers_to_several_prompts_are_numbered_by_prompt(server: LiveServer):
    alone = [complete(server, text, n=2, seed=3, temperature=1.0).json for text in ("ab", "cd")]
    both = complete(server, ["ab", "cd"], n=2, seed=3, temperature=1.0).json
    expected = [choice["text"] for answer in alone for choice in answer["choices"]]
    assert [choice["text"] for choice in both["choices"]] == expected


def test_a_prompt_is_scored_without_an_answer(server: LiveServer):
    choice = complete(server, "abc", echo=True, logprobs=2, max_tokens=0).json["choices"][0]
    assert choice["text"] == "abc"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "c"]
    assert logprobs["text_offset"] == [0, 1, 2]
    assert logprobs["token_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])
    assert logprobs["top_logprobs"][0] is None
    top = logprobs["top_logprobs"][1]
    assert 2 <= len(top) <= 3
    assert top["b"] == logprobs["token_logprobs"][1]  # the chosen one is always there


def test_scores_of_an_echoed_answer_are_those_of_its_prompt(server: LiveServer):
    first = complete(server, "abc", logprobs=0).json["choices"][0]
    whole = complete(server, "abc" + first["text"], echo=True, logprobs=0, max_tokens=1).json
    scores = whole["choices"][0]["logprobs"]["token_logprobs"]
    assert scores[3:7] == pytest.approx(first["logprobs"]["token_logprobs"], abs=1e-3)
    assert first["logprobs"]["text_offset"] == [0, 1, 2, 3]


def test_a_stream_holds_the_same_text(server: LiveServer):
    whole = complete(server, "ab", echo=True, logprobs=1).json["choices"][0]
    events = complete(server, "ab", echo=True, logprobs=1, stream=True).events
    assert events[-1] == "[DONE]"
    choices = [event["choices"][0] for event in events[:-1]]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    for name in ("tokens", "text_offset", "token_logprobs"):
        streamed = [each for choice in choices for each in (choice["logprobs"] or {}).get(name, [])]
        assert streamed == whole["logprobs"][name], name
    assert [choice["finish_reason"] for choice in choices][-1] == "length"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt": ["a"] * 80}, "prompt"),
    ],
)
def test_a_wrong_field_is_named(server: LiveServer, fields, param):
    reply = complete(server, **({"prompt": "a"} | fields))
    assert reply.status == 400
    assert reply.json["error"]["param"] == param
    assert complete(server, "a").status == 200


def test_a_token_outside_of_the_vocabulary_is_refused(server: LiveServer):
    reply = complete(server, [5, 10**6])
    assert reply.status == 400
    assert "1000000" in reply.json["error"]["message"]

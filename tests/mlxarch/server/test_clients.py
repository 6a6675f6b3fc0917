"""The vendors' own Python packages against a real process."""

import contextlib
import gc
import json
import re
import runpy
import subprocess
import sys

import anthropic
import ollama
import openai
import pytest
from house import ROOT
from live_server import LiveServer

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def openai_client(server: LiveServer):
    url = f"http://127.0.0.1:{server.port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def anthropic_client(server: LiveServer):
    url = f"http://127.0.0.1:{server.port}"
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def ollama_client(server: LiveServer):
    with ollama.Client(f"http://127.0.0.1:{server.port}") as client:
        yield client


def test_openai_chat(openai_client):
    create = openai_client.chat.completions.create
    answer = create(model="tiny", messages=USER, max_tokens=5, temperature=0, logprobs=True)
    text = answer.choices[0].message.content
    assert len(text) == 5
    assert answer._request_id.startswith("req_")
    assert "".join(entry.token for entry in answer.choices[0].logprobs.content) == text
    assert answer.usage.completion_tokens == 5
    options = {"include_usage": True}
    chunks = list(
        create(
            model="tiny",
            messages=USER,
            max_tokens=5,
            temperature=0,
            stream=True,
            stream_options=options,
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage.total_tokens == answer.usage.total_tokens
    with openai_client.chat.completions.stream(
        model="tiny", messages=USER, stop=["#"], max_tokens=60, temperature=0
    ) as stream:
        kinds = {event.type for event in stream}
    assert "content.delta" in kinds


def test_openai_parses_an_answer_of_a_schema(openai_client):
    class Answer(openai.BaseModel):
        ok: bool

    done = openai_client.chat.completions.parse(
        model="tiny", messages=USER, response_format=Answer, max_tokens=100
    )
    assert isinstance(done.choices[0].message.parsed, Answer)
    with pytest.raises(openai.LengthFinishReasonError):
        openai_client.chat.completions.parse(
            model="tiny", messages=USER, response_format=Answer, max_tokens=2
        )
    parsed = openai_client.responses.parse(model="tiny", input="hi", text_format=Answer)
    assert isinstance(parsed.output_parsed, Answer)


def test_openai_completions_and_models(openai_client):
    done = openai_client.completions.create(
        model="tiny", prompt=["ab", "cd"], echo=True, logprobs=1, max_tokens=1
    )
    assert [choice.text[:2] for choice in done.choices] == ["ab", "cd"]
    assert done.choices[0].logprobs.token_logprobs[0] is None
    assert [model.id for model in openai_client.models.list()] == ["tiny"]
    assert openai_client.models.retrieve("tiny").id == "tiny"


def test_openai_responses(openai_client):
    first = openai_client.responses.create(model="tiny", input="hi", max_output_tokens=20)
    assert first.output_text
    assert first.usage.input_tokens_details.cached_tokens >= 0
    again = openai_client.responses.create(
        model="tiny", input="go", previous_response_id=first.id, max_output_tokens=20
    )
    assert again.previous_response_id == first.id
    assert openai_client.responses.retrieve(first.id).output_text == first.output_text
    items = list(openai_client.responses.input_items.list(first.id))
    assert items[0].type == "message"
    form = {"type": "json_schema", "name": "x", "schema": {"enum": ["yes", "no"]}}
    with openai_client.responses.stream(model="tiny", input="hi", text={"format": form}) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert events[-1].type == "response.completed"
    assert final.output_text == "".join(
        e.delta for e in events if e.type == "response.output_text.delta"
    )
    openai_client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        openai_client.responses.retrieve(first.id)


def test_openai_errors(openai_client):
    with pytest.raises(openai.NotFoundError) as missing:
        openai_client.chat.completions.create(model="gpt-4", messages=USER)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        openai_client.chat.completions.create(
            model="tiny", messages=USER, extra_body={"frobnicate": 1}
        )
    assert wrong.value.param == "frobnicate"
    with pytest.raises(openai.BadRequestError) as refused:
        openai_client.embeddings.create(model="tiny", input="a")
    assert refused.value.code == "unsupported_model"


def test_anthropic_messages(anthropic_client):
    create = anthropic_client.messages.create
    message = create(model="tiny", messages=USER, max_tokens=5)
    assert message.stop_reason == "max_tokens"
    assert len(message.content[0].text) == 5
    counted = anthropic_client.messages.count_tokens(model="tiny", messages=USER)
    usage = message.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    with anthropic_client.messages.stream(model="tiny", messages=USER, max_tokens=5) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert final.content[0].text == text
    assert final.usage.output_tokens == 5
    thinking = {"type": "enabled", "budget_tokens": 1024}
    with anthropic_client.messages.stream(
        model="tiny", messages=USER, max_tokens=1030, thinking=thinking
    ) as stream:
        for event in stream:
            if event.type == "thinking":
                break
    assert [model.id for model in anthropic_client.models.list()] == ["tiny"]


def test_anthropic_errors(anthropic_client):
    with pytest.raises(anthropic.NotFoundError):
        anthropic_client.messages.create(model="claude", messages=USER, max_tokens=5)
    with pytest.raises(anthropic.BadRequestError, match="frobnicate"):
        anthropic_client.messages.create(
            model="tiny", messages=USER, max_tokens=5, extra_body={"frobnicate": 1}
        )


def test_ollama(ollama_client):
    options = {"num_predict": 5, "temperature": 0}
    whole = ollama_client.chat("tiny", USER, options=options)
    assert len(whole.message.content) == 5
    parts = list(ollama_client.chat("tiny", USER, options=options, stream=True))
    assert "".join(part.message.content for part in parts) == whole.message.content
    assert parts[-1].done_reason == "length"
    assert ollama_client.generate("tiny", "hi", options=options).response == whole.message.content
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    held = ollama_client.chat("tiny", USER, format=schema)
    assert json.loads(held.message.content)["a"] == 1
    assert [model.model for model in ollama_client.list().models] == ["tiny"]
    assert ollama_client.show("tiny").modelinfo["llama.context_length"] == 1280
    assert ollama_client.ps().models[0].model == "tiny"
    with pytest.raises(ollama.ResponseError) as refused:
        ollama_client.pull("org/evil")
    assert refused.value.status_code == 403


# scripts leave it to the end of the process to close their connections
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["openai", "anthropic", "ollama", "langchain"])
def test_the_examples_for_clients_run(server: LiveServer, name, monkeypatch, capsys):
    url = f"http://127.0.0.1:{server.port}"
    script = str(ROOT / "examples" / f"client_{name}.py")
    monkeypatch.setattr(sys, "argv", [script, "hi", "--url", url])
    with contextlib.suppress(openai.LengthFinishReasonError):  # of a model that never ends
        runpy.run_path(script, run_name="__main__")
    gc.collect()
    assert len(capsys.readouterr().out) > 100


def test_the_example_for_curl_runs(server: LiveServer):
    script = ROOT / "examples" / "client_curl.sh"
    command = ["sh", str(script), "hi", f"http://127.0.0.1:{server.port}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "data: [DONE]" in done.stdout
    assert "json_schema" not in done.stdout
    assert re.search(r'"content":"{\\"question\\": ?(true|false)', done.stdout)
    assert "vllm:generation_tokens_total" in done.stdout

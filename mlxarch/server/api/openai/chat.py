"""OpenAI's chat completions: answers, whole and streamed."""

import secrets
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mlxarch import __version__
from mlxarch.errors import MlxArchError
from mlxarch.generation.logprobs import TokenLogprobs
from mlxarch.server.answers.answers import Answers
from mlxarch.server.answers.collected import Call, Collected, collect
from mlxarch.server.answers.events import Delta, End, Usage, Waiting
from mlxarch.server.answers.tools import input_of
from mlxarch.server.api.fields import keep_seconds
from mlxarch.server.api.openai.chat_request import (
    ChatRequest,
    custom_names,
    to_messages,
    to_options,
)
from mlxarch.server.http.context import RequestContext
from mlxarch.server.http.errors import openai_error, to_api_error
from mlxarch.server.http.responses import SSE_COMMENT, SSE_DONE, Stream, json_response, sse
from mlxarch.server.served_models import ServedModel
from mlxarch.server.server import Server
from mlxarch.tokenizer.tokenizer import Tokenizer
from mlxarch.tool_calls.events import CallArguments, CallFinished, CallStarted


async def chat_completions(request: Request) -> Response:
    """Answer POST /v1/chat/completions."""
    server = Server.of(request)
    context = RequestContext.of(request.scope)
    body = server.read(context, ChatRequest)
    messages = to_messages(body.messages)
    served = await server.models.acquire(body.model, context)
    served.keep_seconds = keep_seconds(body.keep_alive, served.keep_seconds)
    options = to_options(body, served, context)
    prompt = await server.render(served, messages, options, context)
    answers = await server.answer(served, [prompt], options, context)
    form = _Form(served, context, options.top_logprobs, custom_names(body))
    if body.stream:
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return Stream(form.stream(answers, usage))
    return json_response(await form.whole(answers))


def usage_object(usage: Usage) -> dict[str, Any]:
    """Usage in the form of chat and text completions."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.answer,
        "total_tokens": usage.prompt + usage.answer,
        "prompt_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": usage.thinking,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def fingerprint(served: ServedModel) -> str:
    """Name of what computes: answers with a seed are comparable where it is the same."""
    quantization = served.language_model.config.get("quantization")
    bits = quantization.get("bits") if isinstance(quantization, dict) else None
    independent = served.running_engine.status().rows_independent
    form = f"{bits}bit" if bits else "unquantized"
    return f"mlxarch-{__version__}-{form}-{'independent' if independent else 'batched'}"


def token_object(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    """Token with its text, its bytes and its log-probability.

    Bytes that are a part of a character stand in the text as ``\\xe6``, as OpenAI's API has it.
    """
    data = tokenizer.bytes_of(token)
    text = data.decode(errors="backslashreplace")
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(data)}


def logprobs_object(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Log-probabilities in the form of chat completions."""
    content = [
        {
            **token_object(tokenizer, entry.token, entry.logprob),
            "top_logprobs": [token_object(tokenizer, *each) for each in entry.top],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


class _Form:
    """Answers in the form of chat completions."""

    def __init__(
        self,
        served: ServedModel,
        context: RequestContext,
        top_logprobs: int | None,
        custom: Collection[str],
    ) -> None:
        self._custom = custom
        self._tokenizer = served.language_model.tokenizer
        self._context = context
        self._with_logprobs = top_logprobs is not None
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": fingerprint(served),
        }

    async def whole(self, answers: Answers) -> dict[str, Any]:
        """Response without a stream."""
        choices = [
            {
                "index": index,
                "message": _message(answer, self._custom),
                "logprobs": self._logprobs(answer.logprobs),
                "finish_reason": answer.end.reason,
            }
            for index, answer in enumerate(await collect(answers))
        ]
        response = {"object": "chat.completion", **self._head, "choices": choices}
        response["usage"] = usage_object(answers.usage)
        if self._context.warnings:
            response["warnings"] = self._context.warnings
        return response

    async def stream(self, answers: Answers, usage: bool) -> AsyncIterator[bytes]:
        """Chunks of a streamed response."""
        custom: dict[tuple[int, int], str] = {}  # arguments of calls whose input is text
        for index in range(answers.count):
            yield self._chunk(index, {"role": "assistant", "content": ""}, usage)
        try:
            async with aclosing(answers.events()) as events:
                async for index, event in events:
                    if isinstance(event, Waiting):
                        yield SSE_COMMENT
                    elif isinstance(event, End):
                        yield self._chunk(index, {}, usage, event.reason)
                    elif isinstance(event, Delta):
                        delta = _delta(event)
                        yield self._chunk(index, delta, usage, logprobs=event.logprobs)
                    elif isinstance(event, CallStarted) and event.name in self._custom:
                        custom[index, event.index] = ""
                        part = _custom_part(event.index, event.id, {"name": event.name})
                        yield self._chunk(index, {"tool_calls": [part]}, usage)
                    elif isinstance(event, CallArguments) and (index, event.index) in custom:
                        custom[index, event.index] += event.text
                    elif isinstance(event, CallFinished) and (index, event.index) in custom:
                        text = input_of(custom[index, event.index])
                        part = _custom_part(event.index, None, {"input": text})
                        yield self._chunk(index, {"tool_calls": [part]}, usage)
                    elif isinstance(event, CallStarted | CallArguments):
                        yield self._chunk(index, {"tool_calls": [_call_part(event)]}, usage)
        except MlxArchError as error:
            self._context.log["error"] = type(error).__name__
            yield sse({"error": openai_error(to_api_error(error))})
            return
        if usage:
            last = {"object": "chat.completion.chunk", **self._head, "choices": []}
            yield sse({**last, "usage": usage_object(answers.usage)})
        yield SSE_DONE

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        usage: bool,
        reason: str | None = None,
        logprobs: Sequence[TokenLogprobs] = (),
    ) -> bytes:
        entries = self._logprobs(logprobs) if logprobs else None
        choice = {"index": index, "delta": delta, "logprobs": entries, "finish_reason": reason}
        chunk: dict[str, Any] = {"object": "chat.completion.chunk", **self._head}
        chunk["choices"] = [choice]
        if usage:
            chunk["usage"] = None
        if reason is not None and self._context.warnings:
            chunk["warnings"] = self._context.warnings
        return sse(chunk)

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        return logprobs_object(self._tokenizer, entries) if self._with_logprobs else None


def _message(answer: Collected, custom: Collection[str]) -> dict[str, Any]:
    content = None if answer.calls and not answer.text else answer.text
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if answer.calls:
        message["tool_calls"] = [_call(call, call.name in custom) for call in answer.calls]
    if answer.thinking:  # two names are in use; clients read either
        message |= {"reasoning_content": answer.thinking, "reasoning": answer.thinking}
    return message


def _call(call: Call, is_custom: bool) -> dict[str, Any]:
    if is_custom:
        custom = {"name": call.name, "input": input_of(call.text)}
        return {"id": call.id, "type": "custom", "custom": custom}
    function = {"name": call.name, "arguments": call.text}
    return {"id": call.id, "type": "function", "function": function}


def _custom_part(index: int, id: str | None, custom: dict[str, str]) -> dict[str, Any]:
    """Part of a call whose input is text: id and name once, then the input."""
    head = {} if id is None else {"id": id, "type": "custom"}
    return {"index": index, **head, "custom": custom}


def _call_part(event: CallStarted | CallArguments) -> dict[str, Any]:
    """Part of a call: id and name once, then the arguments as they are written."""
    if isinstance(event, CallArguments):
        return {"index": event.index, "function": {"arguments": event.text}}
    function = {"name": event.name, "arguments": ""}
    return {"index": event.index, "id": event.id, "type": "function", "function": function}


def _delta(event: Delta) -> dict[str, Any]:
    if event.thinking:
        return {"reasoning_content": event.text, "reasoning": event.text}
    return {"content": event.text}

"""Anthropic's messages: answers, whole and streamed, and the count of a prompt's tokens."""

import base64
import hashlib
import hmac
import secrets
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from mlxarch.errors import MlxArchError
from mlxarch.server.answers.answers import Answers
from mlxarch.server.answers.collected import collect
from mlxarch.server.answers.events import Delta, End, Usage, Waiting
from mlxarch.server.answers.options import Options
from mlxarch.server.api.anthropic.requests import (
    CountRequest,
    MessagesRequest,
    thinking_of,
    to_messages,
    to_options,
    tools_of,
)
from mlxarch.server.http.context import RequestContext
from mlxarch.server.http.errors import error_body, invalid, to_api_error
from mlxarch.server.http.responses import Stream, json_response, sse
from mlxarch.server.prompt_history import PromptRecord
from mlxarch.server.served_models import ServedModel
from mlxarch.server.server import Server
from mlxarch.tool_calls.events import CallArguments, CallStarted

_KEY = secrets.token_bytes(32)
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


async def create_message(request: Request) -> Response:
    """Answer POST /v1/messages."""
    server = Server.of(request)
    context = RequestContext.of(request.scope)
    body = server.read(context, MessagesRequest)
    options = to_options(body, context)
    messages = to_messages(body, context)
    served = await server.models.acquire(body.model, context)
    prompt = await _prompt(server, served, body, messages, options, context)
    answers = await server.answer(served, [prompt], options, context)
    id = f"msg_{secrets.token_hex(12)}"
    record = server.note_prompt(id, served, messages, options, prompt)
    diagnostics = _diagnostics(server, body, record, context)
    shown = body.thinking is None or body.thinking.display != "omitted"
    room = served.language_model.context_length - len(prompt)
    form = _Form(served, context, shown, id, diagnostics, clamped=(options.max_tokens or 0) > room)
    if body.stream:
        return Stream(form.stream(answers, len(prompt)))
    return json_response(await form.whole(answers))


async def count_tokens(request: Request) -> Response:
    """Answer POST /v1/messages/count_tokens; the engine is not asked."""
    server = Server.of(request)
    context = RequestContext.of(request.scope)
    body = server.read(context, CountRequest)
    messages = to_messages(body, context)
    think, effort = thinking_of(body, context)
    served = await server.models.acquire(body.model, context)
    options = Options(think=think, effort=effort, tools=tools_of(body, context))
    prompt = await _prompt(server, served, body, messages, options, context)
    return json_response({"input_tokens": len(prompt)})


async def _prompt(
    server: Server,
    served: ServedModel,
    body: CountRequest,
    messages: list[dict[str, Any]],
    options: Options,
    context: RequestContext,
) -> list[int]:
    """Token ids of the prompt; a last turn of the assistant is continued."""
    if messages[-1]["role"] != "assistant":
        return await server.render(served, messages, options, context)
    if "tool_calls" in messages[-1] or "reasoning_content" in messages[-1]:
        raise invalid("the last turn cannot be continued: it has thinking or calls", "messages")
    return await server.render_open(served, messages, options, context)


def _diagnostics(
    server: Server, body: MessagesRequest, now: PromptRecord, context: RequestContext
) -> dict[str, Any]:
    """Reason of a miss of the prefix cache, if the request asks for it.

    Raises:
        ApiError: the id of the earlier message is no text.
    """
    if body.diagnostics is None:
        return {}
    id = body.diagnostics.get("previous_message_id")
    if id is None:
        return {"diagnostics": {"cache_miss_reason": None}}
    if not isinstance(id, str):
        where = "diagnostics.previous_message_id"
        raise invalid(f"{where} is the id of a message, or null", where)
    before = server.prompts.find(id)
    if before is None:
        return {"diagnostics": {"cache_miss_reason": {"type": "previous_message_not_found"}}}
    change = server.compare_prompts(before, now, context)
    if change is None:
        return {"diagnostics": {"cache_miss_reason": None}}
    if change.reason is None or change.reason == "effort_changed":
        reason: dict[str, Any] = {"type": "unavailable"}
    else:
        reason = {"type": change.reason, "cache_missed_input_tokens": change.missed}
    return {"diagnostics": {"cache_miss_reason": reason | {"explanation": change.sentence}}}


def sign(thinking: str) -> str:
    """Signature of a thinking block: clients send it back, and nobody else reads it."""
    digest = hmac.new(_KEY, thinking.encode(), hashlib.sha256).digest()
    return base64.b64encode(digest).decode()


def _call_id(id: str) -> str:
    """Identifier of a call in the form of this API; always the same for the same call."""
    return f"toolu_{id.removeprefix('call_')}" if id.startswith("call_") else id


def usage_object(usage: Usage) -> dict[str, Any]:
    """Usage in the form of messages; the three parts of the prompt add up to it."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_read_input_tokens": usage.cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.answer,
        "output_tokens_details": {"thinking_tokens": usage.thinking},
    }


class _Form:
    """Answer in the form of messages."""

    def __init__(
        self,
        served: ServedModel,
        context: RequestContext,
        show_thinking: bool,
        id: str,
        diagnostics: dict[str, Any],
        *,
        clamped: bool,
    ) -> None:
        self._context = context
        self._clamped = clamped
        self._shown = show_thinking
        self._head = {
            "id": id,
            "type": "message",
            "role": "assistant",
            "model": served.name,
            **diagnostics,
        }

    def _reason(self, end: End) -> dict[str, Any]:
        reason = "stop_sequence" if end.stop_sequence is not None else _REASONS[end.reason]
        if reason == "max_tokens" and self._clamped:
            reason = "model_context_window_exceeded"
        return {"stop_reason": reason, "stop_sequence": end.stop_sequence}

    async def whole(self, answers: Answers) -> dict[str, Any]:
        """Response without a stream."""
        [answer] = await collect(answers)
        content: list[dict[str, Any]] = []
        if answer.thinking:
            text = answer.thinking if self._shown else ""
            signature = sign(answer.thinking)
            content.append({"type": "thinking", "thinking": text, "signature": signature})
        if answer.text:
            content.append({"type": "text", "text": answer.text})
        for call in answer.calls:
            block = {"type": "tool_use", "id": _call_id(call.id), "name": call.name}
            content.append(block | {"input": msgspec.json.decode(call.text)})
        response = {**self._head, "content": content, **self._reason(answer.end)}
        response["usage"] = usage_object(answers.usage)
        if self._context.warnings:
            response["warnings"] = self._context.warnings
        return response

    async def stream(self, answers: Answers, prompt: int) -> AsyncIterator[bytes]:
        """Events of a streamed response."""
        blocks = _Blocks(self._shown)
        begun = False
        try:
            async with aclosing(answers.events()) as events:
                async for _, event in events:
                    if isinstance(event, Waiting):
                        yield _event({"type": "ping"})
                        continue
                    if not begun:
                        begun = True
                        yield self._start(answers.usage)
                    if isinstance(event, Delta):
                        for each in blocks.add(event):
                            yield _event(each)
                    elif isinstance(event, CallStarted | CallArguments):
                        for each in blocks.add_call(event):
                            yield _event(each)
                    elif isinstance(event, End):
                        for each in (*blocks.close(), self._end(event, answers.usage)):
                            yield _event(each)
        except MlxArchError as error:
            self._context.log["error"] = type(error).__name__
            refusal = to_api_error(error)
            yield _event(error_body("anthropic", refusal, self._context.id))
            return
        yield _event({"type": "message_stop"})

    def _start(self, usage: Usage) -> bytes:
        counts = {**usage_object(usage), "output_tokens": 1}
        reasons = {"stop_reason": None, "stop_sequence": None}
        message = {**self._head, "content": [], **reasons, "usage": counts}
        return _event({"type": "message_start", "message": message})

    def _end(self, end: End, usage: Usage) -> dict[str, Any]:
        delta = self._reason(end)
        event = {"type": "message_delta", "delta": delta, "usage": usage_object(usage)}
        return event | ({"warnings": self._context.warnings} if self._context.warnings else {})


def _event(value: dict[str, Any]) -> bytes:
    return sse(value, value["type"])


class _Blocks:
    """Content blocks of a stream: one after the other, without a gap in their numbers."""

    def __init__(self, show_thinking: bool) -> None:
        self._shown = show_thinking
        self._index = -1
        self._kind: str | None = None
        self._thinking = ""

    def add(self, event: Delta) -> list[dict[str, Any]]:
        """Events for text or thinking."""
        kind = "thinking" if event.thinking else "text"
        block = {"type": kind, kind: ""} | ({"signature": ""} if event.thinking else {})
        events = [] if kind == self._kind else [*self.close(), self._open(kind, block)]
        if kind == "text":
            return [*events, self._delta({"type": "text_delta", "text": event.text})]
        self._thinking += event.text
        if self._shown:
            events.append(self._delta({"type": "thinking_delta", "thinking": event.text}))
        return events

    def add_call(self, event: CallStarted | CallArguments) -> list[dict[str, Any]]:
        """Events for a call of a tool."""
        if isinstance(event, CallArguments):
            return [self._delta({"type": "input_json_delta", "partial_json": event.text})]
        head = {"type": "tool_use", "id": _call_id(event.id), "name": event.name, "input": {}}
        return [*self.close(), self._open("tool_use", head)]

    def close(self) -> list[dict[str, Any]]:
        """Events that end the open block."""
        if self._kind is None:
            return []
        events = []
        if self._kind == "thinking":
            signature = sign(self._thinking)
            events.append(self._delta({"type": "signature_delta", "signature": signature}))
        self._kind = None
        return [*events, {"type": "content_block_stop", "index": self._index}]

    def _open(self, kind: str, block: dict[str, Any]) -> dict[str, Any]:
        self._index += 1
        self._kind = kind
        self._thinking = ""
        return {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

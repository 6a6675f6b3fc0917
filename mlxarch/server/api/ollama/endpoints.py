"""Ollama's API: chat, generate, and the list of models; models are managed on the command line."""

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from mlxarch.engine.request import TokenLogprobs
from mlxarch.errors import MlxArchError
from mlxarch.server.answers.answers import Answers
from mlxarch.server.answers.collected import Call, Collected, collect
from mlxarch.server.answers.events import Delta, End
from mlxarch.server.answers.options import Options
from mlxarch.server.api.fields import keep_seconds
from mlxarch.server.api.fill_in_middle import fill_in_prompt
from mlxarch.server.api.ollama.requests import (
    ChatRequest,
    GenerateRequest,
    ShowRequest,
    to_messages,
    to_options,
)
from mlxarch.server.api.openai.chat import logprobs_object
from mlxarch.server.http.context import RequestContext
from mlxarch.server.http.errors import ApiError, error_body, invalid, to_api_error
from mlxarch.server.http.responses import Stream, encode_json, json_response
from mlxarch.server.served_models import ServedModel
from mlxarch.server.server import Server
from mlxarch.tool_calls.detect import call_form
from mlxarch.tool_calls.events import CallFailed, CallFinished

VERSION = "0.12.0"  # of the API that is spoken here; clients compare it
_REASONS = {"stop": "stop", "length": "length", "tool_calls": "stop"}
_MANAGED = ("pull", "push", "create", "copy", "delete", "blobs/{digest:path}")
_FOREVER = timedelta(days=36500)


def routes() -> list[BaseRoute]:
    """Paths of the API."""
    return [
        Route("/api/version", version, methods=["GET"]),
        Route("/api/tags", tags, methods=["GET"]),
        Route("/api/ps", running, methods=["GET"]),
        Route("/api/show", show, methods=["POST"]),
        Route("/api/chat", chat, methods=["POST"]),
        Route("/api/generate", generate, methods=["POST"]),
        Route("/api/embed", embed, methods=["POST"]),
        Route("/api/embeddings", embed, methods=["POST"]),
        *(Route(f"/api/{name}", manage, methods=["GET", "POST", "DELETE"]) for name in _MANAGED),
    ]


async def version(_: Request) -> Response:
    """Answer GET /api/version."""
    return json_response({"version": VERSION})


async def manage(_: Request) -> Response:
    """Refuse to change which models there are: no request may fetch or remove one."""
    raise ApiError(
        403, "models are managed on the command line: `mlxarch pull NAME`, `mlxarch rm NAME`"
    )


async def embed(_: Request) -> Response:
    """Refuse to embed, as the OpenAI endpoint does."""
    raise ApiError(400, "this model was not trained to embed texts; use an embedding model")


async def tags(request: Request) -> Response:
    """Answer GET /api/tags."""
    models = Server.of(request).models.all()
    return json_response({"models": [_model(served) for served in models]})


async def running(request: Request) -> Response:
    """Answer GET /api/ps."""
    now = datetime.now(UTC)
    models = []
    for served in Server.of(request).models.all():
        if served.state != "loaded":
            continue
        left = served.expires_in
        forever = _FOREVER.total_seconds()
        until = now + timedelta(seconds=forever if left is None else min(left, forever))
        plan = served.language_model.plan
        entry = _model(served) | {
            "expires_at": until.isoformat().replace("+00:00", "Z"),
            "size_vram": plan.mlx_peak if plan is not None else 0,
            "context_length": served.language_model.context_length,
            "users": served.users,
        }
        models.append(entry)
    return json_response({"models": models})


async def show(request: Request) -> Response:
    """Answer POST /api/show."""
    server = Server.of(request)
    context = RequestContext.of(request.scope)
    body = server.read(context, ShowRequest)
    name = body.model or body.name
    if not name:
        raise invalid("model is missing", "model")
    served = await server.models.acquire(name, context)
    model = served.language_model
    family = str(model.config.get("model_type", "unknown"))
    capabilities = ["completion"]
    tokenizer = model.tokenizer
    if tokenizer.template_variables & {"enable_thinking", "thinking", "reasoning_effort"}:
        capabilities.append("thinking")
    if call_form(tokenizer) is not None:
        capabilities.append("tools")
    info = {
        "general.architecture": family,
        "general.basename": served.name,
        f"{family}.context_length": model.context_length,
    }
    return json_response(
        {
            "license": "",
            "modelfile": "",
            "parameters": f"temperature {served.sampling.temperature:g}",
            "template": tokenizer.chat_template or "",
            "details": _details(served),
            "model_info": info,
            "capabilities": capabilities,
            "modified_at": _time(served.created),
        }
    )


async def chat(request: Request) -> Response:
    """Answer POST /api/chat."""
    server = Server.of(request)
    context = RequestContext.of(request.scope)
    body = server.read(context, ChatRequest)
    served = server.models.find(body.model)
    if not body.messages:
        return await _load_or_unload(server, served, body.keep_alive, context, "chat")
    messages = to_messages(body)
    await server.models.acquire(body.model, context)
    options = to_options(body, served, context)
    prompt = await server.render(served, messages, options, context)
    return await _answer(server, served, body, options, prompt, context, "chat")


async def generate(request: Request) -> Response:
    """Answer POST /api/generate."""
    server = Server.of(request)
    context = RequestContext.of(request.scope)
    body = server.read(context, GenerateRequest)
    served = server.models.find(body.model)
    if not body.prompt:
        return await _load_or_unload(server, served, body.keep_alive, context, "generate")
    body.check()
    await server.models.acquire(body.model, context)
    options = to_options(body, served, context)
    model = served.language_model
    if body.suffix:
        prompt = await server.in_thread(fill_in_prompt, model.tokenizer, body.prompt, body.suffix)
        options = replace(options, continues=True)
    elif body.raw or not model.tokenizer.has_chat_template:
        if body.system:
            context.warn("system is not used: the prompt is read as it is")
        prompt = await server.in_thread(model.tokens_of, body.prompt)
        options = replace(options, continues=True)
    else:
        system = [{"role": "system", "content": body.system}] if body.system else []
        messages = [*system, {"role": "user", "content": body.prompt}]
        prompt = await server.render(served, messages, options, context)
    return await _answer(server, served, body, options, prompt, context, "generate")


async def _answer(
    server: Server,
    served: ServedModel,
    body: ChatRequest | GenerateRequest,
    options: Options,
    prompt: list[int],
    context: RequestContext,
    kind: Literal["chat", "generate"],
) -> Response:
    served.keep_seconds = keep_seconds(body.keep_alive, served.keep_seconds)
    answers = await server.answer(served, [prompt], options, context)
    form = _Form(served, context, kind)
    if body.stream is False:
        return json_response(await form.whole(answers))
    return Stream(form.stream(answers), "application/x-ndjson")


async def _load_or_unload(
    server: Server,
    served: ServedModel,
    keep_alive: str | int | float | None,
    context: RequestContext,
    kind: Literal["chat", "generate"],
) -> Response:
    """Answer a request without a prompt: it loads the model, or unloads it with keep_alive 0."""
    seconds = keep_seconds(keep_alive, served.keep_seconds)
    reason = "unload" if seconds == 0 else "load"
    if seconds == 0:
        served.keep_seconds = 0  # until requests that run have ended
        await server.models.unload(served)
    else:
        await server.models.acquire(served.name, context)
        served.keep_seconds = seconds
    form = _Form(served, context, kind)
    return json_response(form.line("") | {"done": True, "done_reason": reason})


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _details(served: ServedModel) -> dict[str, Any]:
    config = served.model.config if served.model is not None else {}
    family = str(config.get("model_type", ""))
    quantization = config.get("quantization")
    bits = quantization.get("bits") if isinstance(quantization, dict) else None
    return {
        "parent_model": "",
        "format": "mlx",
        "family": family,
        "families": [family],
        "parameter_size": "",
        "quantization_level": f"{bits} bits" if bits else "",
    }


def _model(served: ServedModel) -> dict[str, Any]:
    plan = served.model.plan if served.model is not None else None
    return {
        "name": served.name,
        "model": served.name,
        "modified_at": _time(served.created),
        "size": plan.mlx_peak if plan is not None else 0,
        "digest": "",
        "details": _details(served),
    }


class _Form:
    """Answer in the form of Ollama's API."""

    def __init__(
        self, served: ServedModel, context: RequestContext, kind: Literal["chat", "generate"]
    ) -> None:
        self._served = served
        self._context = context
        self._kind = kind

    def line(self, text: str, thinking: str = "") -> dict[str, Any]:
        """One line of a stream, or the beginning of a whole response."""
        head = {
            "model": self._served.name,
            "created_at": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
        }
        thoughts = {"thinking": thinking} if thinking else {}
        if self._kind == "generate":
            return {**head, "response": text, **thoughts, "done": False}
        message = {"role": "assistant", "content": text, **thoughts}
        return {**head, "message": message, "done": False}

    def _end(self, end: End) -> dict[str, Any]:
        usage = end.usage
        timings = end.timings
        prefill = timings.prefill_seconds if timings is not None else 0.0
        decode = timings.decode_seconds if timings is not None else 0.0
        queue = timings.queue_seconds if timings is not None else 0.0
        last = {
            "done": True,
            "done_reason": _REASONS[end.reason],
            "total_duration": _nanoseconds(queue + prefill + decode),
            "load_duration": 0,
            "prompt_eval_count": usage.prompt,
            "prompt_eval_duration": _nanoseconds(prefill),
            "eval_count": usage.answer,
            "eval_duration": _nanoseconds(decode),
        }
        return last | ({"warnings": self._context.warnings} if self._context.warnings else {})

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        if not entries:
            return {}
        tokenizer = self._served.language_model.tokenizer
        return {"logprobs": logprobs_object(tokenizer, entries)["content"]}

    async def whole(self, answers: Answers) -> dict[str, Any]:
        """Response without a stream."""
        [answer] = await collect(answers)
        line = self.line(answer.text, answer.thinking)
        if answer.calls:
            line["message"]["tool_calls"] = [_call(call) for call in answer.calls]
        return line | self._logprobs(answer.logprobs) | self._end(answer.end)

    async def stream(self, answers: Answers) -> AsyncIterator[bytes]:
        """Lines of a streamed response."""
        collected = Collected()
        try:
            async with aclosing(answers.events()) as events:
                async for _, event in events:
                    collected.add(event)
                    if isinstance(event, CallFinished):
                        line = self.line("")
                        line["message"]["tool_calls"] = [_call(collected.calls[-1])]
                        yield encode_json(line) + b"\n"
                    elif isinstance(event, CallFailed):
                        yield encode_json(self.line(event.text)) + b"\n"
                    elif isinstance(event, Delta) and event.thinking:
                        yield encode_json(self.line("", event.text)) + b"\n"
                    elif isinstance(event, Delta):
                        line = self.line(event.text) | self._logprobs(event.logprobs)
                        yield encode_json(line) + b"\n"
                    elif isinstance(event, End):
                        yield encode_json(self.line("") | self._end(event)) + b"\n"
        except MlxArchError as error:
            self._context.log["error"] = type(error).__name__
            refusal = to_api_error(error)
            yield encode_json(error_body("ollama", refusal, self._context.id)) + b"\n"


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": msgspec.json.decode(call.text)}
    return {"id": call.id, "function": function}


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)

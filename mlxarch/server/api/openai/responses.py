"""OpenAI's responses: answers as items, whole and streamed, stored for later turns."""

import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mlxarch.errors import MlxArchError
from mlxarch.server.answers.answers import Answers
from mlxarch.server.answers.events import Delta, End, Waiting
from mlxarch.server.answers.options import Options
from mlxarch.server.api.fields import JsonObject
from mlxarch.server.api.openai.response_writer import ResponseWriter
from mlxarch.server.api.openai.responses_request import (
    ResponsesRequest,
    check,
    custom_names,
    input_items,
    namespaces,
    to_messages,
    to_options,
    with_ids,
)
from mlxarch.server.http.context import RequestContext
from mlxarch.server.http.errors import ApiError, invalid, to_api_error
from mlxarch.server.http.responses import SSE_COMMENT, Stream, json_response, sse
from mlxarch.server.prompt_history import PromptRecord
from mlxarch.server.response_store import ResponseStore, StoredResponse
from mlxarch.server.served_models import ServedModel
from mlxarch.server.server import Server
from mlxarch.tool_calls.events import CallArguments, CallStarted

_MISS_REASONS = {
    "system_changed": "input_changed",
    "messages_changed": "input_changed",
    "effort_changed": "reasoning_effort_changed",
}


async def create_response(request: Request) -> Response:
    """Answer POST /v1/responses."""
    server = Server.of(request)
    context = RequestContext.of(request.scope)
    body = server.read(context, ResponsesRequest)
    check(body)
    store = server.responses
    earlier = _earlier_items(body, store)
    inputs = with_ids(input_items(body))
    items = [*earlier, *inputs]
    messages = to_messages(items, store.items())
    if body.instructions:
        messages.insert(0, {"role": "system", "content": body.instructions})
    if not messages:
        raise invalid("input has no message", "input")
    served = await server.models.acquire(body.model, context)
    options = to_options(body, context)
    prompt = await server.render(served, messages, options, context)
    if body.truncation == "auto":
        prompt = await _truncated(server, served, messages, prompt, options, context)
    answers = await server.answer(served, [prompt], options, context)
    response = _response(body, served)
    record = server.note_prompt(response["id"], served, messages, options, prompt)
    response |= _diagnostics(server, body, record, context)
    summary = body.reasoning is not None and (
        body.reasoning.summary or body.reasoning.generate_summary
    )
    writer = ResponseWriter(
        response,
        served.language_model.tokenizer,
        summarize=bool(summary),
        seal="reasoning.encrypted_content" in (body.include or ()),
        namespaces=namespaces(body),
        custom=custom_names(body),
    )
    keep = None if body.store is False else store
    events = _events(writer, answers, context, items, inputs, keep)
    if body.stream:
        return Stream(_encoded(events))
    async for event in events:
        if event is not None and event["type"] == "response.failed":
            raise ApiError(500, response["error"]["message"], code=response["error"]["code"])
    return json_response(response)


def _diagnostics(
    server: Server, body: ResponsesRequest, now: PromptRecord, context: RequestContext
) -> dict[str, Any]:
    """Reason of a miss of the prefix cache, if the request asks for it.

    Raises:
        ApiError: the id of the earlier response is no text.
    """
    id = (body.prompt_cache_options or {}).get("comparison_response_id")
    if id is None:
        return {}
    if not isinstance(id, str):
        where = "prompt_cache_options.comparison_response_id"
        raise invalid(f"{where} is the id of a response", where)
    before = server.prompts.find(id)
    if before is None:
        return {"prompt_cache_diagnostics": {"type": "comparison_response_not_found"}}
    change = server.compare_prompts(before, now, context)
    if change is None:
        return {"prompt_cache_diagnostics": {"type": "cache_hit"}}
    if change.reason is None:
        return {"prompt_cache_diagnostics": {"type": "unavailable"}}
    reason = _MISS_REASONS.get(change.reason, change.reason)
    miss = {"type": "cache_miss", "reason": reason, "cache_missed_tokens": change.missed}
    more = {"comparison_reusable_tokens": change.reusable, "explanation": change.sentence}
    return {"prompt_cache_diagnostics": miss | more}


async def _truncated(
    server: Server,
    served: ServedModel,
    messages: list[dict[str, Any]],
    prompt: list[int],
    options: Options,
    context: RequestContext,
) -> list[int]:
    """Prompt without as many of the oldest turns as do not fit into the context."""
    room = served.language_model.context_length - (options.max_tokens or 1)
    left = list(messages)
    while len(prompt) > room:
        first = next((n for n, each in enumerate(left) if each["role"] != "system"), len(left))
        later = range(first + 1, len(left))
        second = next((n for n in later if left[n]["role"] == "user"), len(left))
        if second == len(left):
            return prompt  # the last turn alone is too long, which is refused
        del left[first:second]
        context.warn("truncation: the oldest turns were left out, since they do not fit")
        prompt = await server.render(served, left, options, context)
    return prompt


def _earlier_items(body: ResponsesRequest, store: ResponseStore) -> list[JsonObject]:
    if body.previous_response_id is None:
        return []
    stored = store.find(body.previous_response_id)
    if stored is None:
        raise invalid(
            "previous_response_id names no response that is stored here; responses are kept in "
            "memory for an hour",
            "previous_response_id",
            "previous_response_not_found",
        )
    return stored.items


def _response(body: ResponsesRequest, served: ServedModel) -> dict[str, Any]:
    text = body.text
    reasoning = body.reasoning
    sampling = served.sampling
    return {
        "id": f"resp_{secrets.token_hex(16)}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "completed_at": None,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "model": served.name,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {
            "effort": reasoning.effort if reasoning is not None else None,
            "summary": reasoning.summary if reasoning is not None else None,
        },
        "prompt_cache_key": body.prompt_cache_key,
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": sampling.temperature if body.temperature is None else body.temperature,
        "text": {
            "format": (text.format if text is not None else None) or {"type": "text"},
            "verbosity": (text.verbosity if text is not None else None) or "medium",
        },
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": sampling.top_p if body.top_p is None else body.top_p,
        "truncation": body.truncation or "disabled",
        "usage": None,
        "user": body.user,
    }


async def _events(
    writer: ResponseWriter,
    answers: Answers,
    context: RequestContext,
    items: list[JsonObject],
    inputs: list[JsonObject],
    store: ResponseStore | None,
) -> AsyncIterator[dict[str, Any] | None]:
    """Events of a response; None is a sign of life."""
    for event in writer.begin():
        yield event
    try:
        async with aclosing(answers.events()) as found:
            async for _, event in found:
                written: list[dict[str, Any]] = []
                if isinstance(event, Waiting):
                    yield None
                elif isinstance(event, Delta):
                    written = writer.add(event)
                elif isinstance(event, CallStarted | CallArguments):
                    written = writer.add_call(event)
                elif isinstance(event, End):
                    if context.warnings:
                        writer.response["warnings"] = context.warnings
                    written = writer.finish(event, answers.usage)
                for each in written:
                    yield each
    except MlxArchError as error:
        context.log["error"] = type(error).__name__
        refusal = to_api_error(error)
        yield writer.fail(refusal.code or "server_error", refusal.message)
        return
    if store is not None:
        response = writer.response
        store.add(StoredResponse(response, [*items, *response["output"]], inputs))


async def _encoded(events: AsyncIterator[dict[str, Any] | None]) -> AsyncIterator[bytes]:
    async for event in events:
        yield SSE_COMMENT if event is None else sse(event, event["type"])


def _found(request: Request) -> StoredResponse:
    stored = Server.of(request).responses.find(request.path_params["id"])
    if stored is None:
        raise ApiError(404, "there is no stored response of this id", code="response_not_found")
    return stored


async def show_response(request: Request) -> Response:
    """Answer GET /v1/responses/ID."""
    return json_response(_found(request).response)


async def delete_response(request: Request) -> Response:
    """Answer DELETE /v1/responses/ID."""
    id = _found(request).response["id"]
    Server.of(request).responses.remove(id)
    return json_response({"id": id, "object": "response", "deleted": True})


async def list_input_items(request: Request) -> Response:
    """Answer GET /v1/responses/ID/input_items."""
    given = request.query_params
    order = given.get("order", "desc")
    if order not in ("asc", "desc"):
        raise invalid(f"order is {order!r:.40}; it is asc or desc", "order")
    limit = given.get("limit", "20")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:4]) <= 100):
        raise invalid(f"limit is {limit!r:.40}; it lies in 1 … 100", "limit")
    items = _found(request).inputs[:: 1 if order == "asc" else -1]
    ids = [item.get("id") for item in items]
    after = given.get("after")
    if after is not None and after not in ids:
        raise invalid("after names no item of this response", "after")
    first = 0 if after is None else ids.index(after) + 1
    shown = items[first : first + int(limit)]
    page = {"object": "list", "data": shown, "has_more": first + len(shown) < len(items)}
    ends = {"first_id": shown[0].get("id"), "last_id": shown[-1].get("id")} if shown else {}
    return json_response({**page, "first_id": None, "last_id": None, **ends})

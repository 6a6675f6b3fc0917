"""Description of the server's requests in the form of OpenAPI 3.1, made from the types that validate them."""

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from mlxarch import __version__
from mlxarch.server.api.anthropic.requests import CountRequest, MessagesRequest
from mlxarch.server.api.ollama import requests as ollama
from mlxarch.server.api.openai.chat_request import ChatRequest
from mlxarch.server.api.openai.completions import CompletionRequest
from mlxarch.server.api.openai.responses_request import ResponsesRequest
from mlxarch.server.api.tokenization import DetokenizeRequest, TokenizeRequest
from mlxarch.server.http.responses import json_response

_POST: dict[str, tuple[type[msgspec.Struct], str]] = {
    "/v1/chat/completions": (ChatRequest, "Answer a conversation."),
    "/v1/completions": (CompletionRequest, "Continue texts."),
    "/v1/responses": (ResponsesRequest, "Answer with items."),
    "/v1/messages": (MessagesRequest, "Answer a conversation, in Anthropic's form."),
    "/v1/messages/count_tokens": (CountRequest, "Count the tokens of a conversation."),
    "/api/chat": (ollama.ChatRequest, "Answer a conversation, in Ollama's form."),
    "/api/generate": (ollama.GenerateRequest, "Answer a text, in Ollama's form."),
    "/api/show": (ollama.ShowRequest, "Show a model."),
    "/tokenize": (TokenizeRequest, "Token ids of a text."),
    "/detokenize": (DetokenizeRequest, "Text of token ids."),
}
_GET = {
    "/health": "State of the server.",
    "/metrics": "Figures for Prometheus.",
    "/v1/models": "List the models.",
    "/api/version": "Version of Ollama's API.",
    "/api/tags": "List the models, in Ollama's form.",
    "/api/ps": "List the loaded models.",
}
_BY_ID = {
    ("get", "/v1/models/{name}"): "Show a model.",
    ("get", "/v1/responses/{id}"): "Show a stored response.",
    ("delete", "/v1/responses/{id}"): "Forget a stored response.",
    ("get", "/v1/responses/{id}/input_items"): "List the items of a stored response's input.",
}
_RESPONSES = {"200": {"description": "Success"}, "4XX": {"description": "Refused, with the reason"}}


def description() -> dict[str, Any]:
    """The whole description."""
    kinds = [kind for kind, _ in _POST.values()]
    template = "#/components/schemas/{name}"
    schemas, components = msgspec.json.schema_components(kinds, ref_template=template)
    paths: dict[str, Any] = {
        path: {"get": {"summary": summary, "responses": _RESPONSES}}
        for path, summary in _GET.items()
    }
    for (method, path), summary in _BY_ID.items():
        name = path.partition("{")[2].partition("}")[0]
        parameter = {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        operation = {"summary": summary, "parameters": [parameter], "responses": _RESPONSES}
        paths.setdefault(path, {})[method] = operation
    for (path, (_, summary)), schema in zip(_POST.items(), schemas, strict=True):
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths[path] = {"post": {"summary": summary, "requestBody": body, "responses": _RESPONSES}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "mlxarch", "version": __version__},
        "paths": paths,
        "components": {"schemas": components},
    }


async def openapi(_: Request) -> Response:
    """Answer GET /openapi.json."""
    return json_response(description())

"""State of the server: health and start page."""

from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from mlxarch import __version__
from mlxarch.server.http.access import AccessRules
from mlxarch.server.http.responses import json_response
from mlxarch.server.server import Server

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>mlxarch</title></head><body>
<h1>mlxarch {version}</h1>
<p>This server answers the clients of OpenAI, Anthropic and Ollama.</p>
<ul>
<li><a href="/health">/health</a>: state of the server</li>
<li><a href="/v1/models">/v1/models</a>: models</li>
<li><a href="/openapi.json">/openapi.json</a>: description of all requests</li>
<li><a href="/metrics">/metrics</a>: figures for Prometheus</li>
<li>POST /v1/chat/completions, /v1/completions, /v1/responses: OpenAI's APIs</li>
<li>POST /v1/messages, /v1/messages/count_tokens: Anthropic's API</li>
<li>POST /api/chat, /api/generate, /api/show; GET /api/tags, /api/ps, /api/version: Ollama's API</li>
<li>POST /tokenize, /detokenize: text to token ids and back</li>
</ul></body></html>
"""


async def health(request: Request) -> Response:
    """Answer GET /health: 200 when the first model can answer, else 503."""
    server = Server.of(request)
    served = server.models.default
    named = AccessRules(server.settings).has_key(Headers(scope=request.scope))
    name: dict[str, Any] = {"model": served.name} if named else {}
    if server.death is not None:
        return json_response({"status": "error", "reason": "an engine has failed"}, 503)
    if served.state == "failed":
        reason = str(served.error) if named else "the model could not be loaded"
        return json_response({"status": "error", "reason": reason, **name}, 503)
    if served.state == "loading":
        progress = served.describe_progress()
        return json_response({"status": "loading", "progress": progress, **name}, 503)
    return json_response({"status": "ok", **name})


async def start_page(request: Request) -> Response:
    """Answer GET / and HEAD /."""
    policy = "default-src 'none'; base-uri 'none'; frame-ancestors 'none'"
    headers = {"content-security-policy": policy, "referrer-policy": "no-referrer"}
    return HTMLResponse(_PAGE.format(version=__version__), headers=headers)

"""List of the served models, in one form for the clients of OpenAI and Anthropic."""

from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mlxarch.generation.thinking.splitter import thinking_tags
from mlxarch.server.http.responses import json_response
from mlxarch.server.served_models import ServedModel
from mlxarch.server.server import Server
from mlxarch.tokenizer.tokenizer import Tokenizer


async def list_models(request: Request) -> Response:
    """Answer GET /v1/models."""
    models = [model_object(served) for served in Server.of(request).models.all()]
    first_id = models[0]["id"]
    last_id = models[-1]["id"]
    page = {"object": "list", "data": models, "has_more": False}
    return json_response({**page, "first_id": first_id, "last_id": last_id})


async def show_model(request: Request) -> Response:
    """Answer GET /v1/models/NAME; a name may hold slashes."""
    served = Server.of(request).models.find(request.path_params["name"])
    return json_response(model_object(served))


def model_object(served: ServedModel) -> dict[str, Any]:
    """Model with the keys of both APIs, and those that other tools read."""
    created = datetime.fromtimestamp(served.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    result: dict[str, Any] = {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "mlxarch",
        "type": "model",
        "display_name": served.name,
        "created_at": created,
        "lifecycle": "active",
        "state": served.state,
    }
    if served.model is not None:
        length = served.model.context_length
        names = ("context_length", "max_model_len", "max_input_tokens", "max_tokens")
        result |= dict.fromkeys(names, length)
        result["capabilities"] = _capabilities(served.model.tokenizer)
    return result


def _capabilities(tokenizer: Tokenizer) -> dict[str, Any]:
    """Capabilities of a model in the form of Anthropic's list."""
    no = {"supported": False}
    thinks = {"supported": thinking_tags(tokenizer) is not None}
    has_effort = {"supported": "reasoning_effort" in tokenizer.template_variables}
    efforts = dict.fromkeys(("low", "medium", "high", "max"), has_effort)
    kinds = {"adaptive": thinks, "enabled": thinks, "between_tools": thinks}
    return {
        "batch": no,
        "citations": no,
        "code_execution": no,
        "context_management": no,
        "effort": {**has_effort, **efforts},
        "image_input": no,
        "pdf_input": no,
        "server_tools": {**no, "code_execution": no, "web_search": no},
        "structured_outputs": {"supported": True},
        "thinking": {**thinks, "types": {**kinds, "disabled": {"supported": True}}},
    }

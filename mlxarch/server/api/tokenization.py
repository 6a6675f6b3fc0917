"""Token ids of texts and texts of token ids, and refusals of what this server does not do."""

from typing import Annotated

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from mlxarch.server.api.fields import Strict
from mlxarch.server.http.context import RequestContext
from mlxarch.server.http.errors import ApiError, invalid
from mlxarch.server.http.responses import json_response
from mlxarch.server.server import Server


class TokenizeRequest(Strict):
    """Body of POST /tokenize."""

    content: str | None = None
    prompt: str | None = None
    model: str | None = None
    add_special: bool = False
    add_special_tokens: bool | None = None
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(Strict):
    """Body of POST /detokenize."""

    tokens: list[Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]]
    model: str | None = None


async def tokenize(request: Request) -> Response:
    """Answer POST /tokenize."""
    server = Server.of(request)
    context = RequestContext.of(request.scope)
    body = server.read(context, TokenizeRequest)
    served = await server.models.acquire(body.model, context)
    tokenizer = served.language_model.tokenizer
    text = body.content if body.content is not None else body.prompt
    if text is None:
        raise invalid("content is missing: the text to convert", "content")
    given = text
    special = body.add_special if body.add_special_tokens is None else body.add_special_tokens

    def encode() -> list[int]:
        return tokenizer.encode(given, add_special_tokens=special, parse_special=body.parse_special)

    tokens = await server.in_thread(encode)
    listed = tokens
    if body.with_pieces:
        listed = [{"id": token, "piece": _piece(tokenizer.bytes_of(token))} for token in tokens]
    length = served.language_model.context_length
    return json_response({"tokens": listed, "count": len(tokens), "max_model_len": length})


def _piece(data: bytes) -> str | list[int]:
    """Text of a token; its bytes, if they are a part of a character."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


async def detokenize(request: Request) -> Response:
    """Answer POST /detokenize."""
    server = Server.of(request)
    context = RequestContext.of(request.scope)
    body = server.read(context, DetokenizeRequest)
    served = await server.models.acquire(body.model, context)
    text = served.language_model.tokenizer.decode(body.tokens, skip_special_tokens=False)
    return json_response({"content": text, "prompt": text})


async def embeddings(request: Request) -> Response:
    """Refuse to embed: hidden states of a language model rank badly, and nobody would notice."""
    raise ApiError(
        400,
        "this model was not trained to embed texts; use an embedding model of another server",
        code="unsupported_model",
        param="model",
    )

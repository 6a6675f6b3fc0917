"""Requests of Ollama's API: their fields, and their translation."""

from typing import Any, Literal

from mlxarch.server.answers.constraint import AnswerSchema
from mlxarch.server.answers.options import Options, stop_strings
from mlxarch.server.answers.tools import ToolOptions
from mlxarch.server.api.fields import (
    JsonObject,
    KeepAlive,
    Penalty,
    Probability,
    RepetitionPenalty,
    Seed,
    Strict,
    Temperature,
    TopK,
    TopLogprobs,
    positive,
)
from mlxarch.server.api.openai.chat_request import effort_switch
from mlxarch.server.http.context import RequestContext
from mlxarch.server.http.errors import invalid
from mlxarch.server.served_models import ServedModel


class ModelOptions(Strict):
    """Options of an answer."""

    num_predict: int | None = None
    num_ctx: int | None = None
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: Probability | None = None
    min_p: Probability | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    repeat_penalty: RepetitionPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    # of other machinery, without an effect on the answer here
    num_keep: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    main_gpu: int | None = None
    num_thread: int | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None
    numa: bool | None = None
    low_vram: bool | None = None
    repeat_last_n: int | None = None
    typical_p: float | None = None
    tfs_z: float | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    penalize_newline: bool | None = None


_UNSUPPORTED = ("typical_p", "tfs_z", "mirostat", "mirostat_tau", "mirostat_eta", "repeat_last_n")


class Answering(Strict):
    """Fields that chat and generate share."""

    model: str
    stream: bool | None = None
    options: ModelOptions | None = None
    format: str | JsonObject | None = None
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    keep_alive: KeepAlive = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    truncate: bool | None = None
    shift: bool | None = None


class Message(Strict):
    """Message of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: list[str] | None = None
    tool_calls: list[JsonObject] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    name: str | None = None


class ChatRequest(Answering):
    """Body of POST /api/chat."""

    messages: list[Message] = []
    tools: list[JsonObject] | None = None


class GenerateRequest(Answering):
    """Body of POST /api/generate."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    suffix: str | None = None
    template: str | None = None
    context: list[int] | None = None
    images: list[str] | None = None

    def check(self) -> None:
        """Refuse what is not supported.

        Raises:
            ApiError: a field asks for it.
        """
        for name in ("template", "context", "images"):
            if getattr(self, name):
                raise invalid(f"{name} is not supported; leave it out", name)


class ShowRequest(Strict):
    """Body of POST /api/show."""

    model: str | None = None
    name: str | None = None
    verbose: bool | None = None


def to_messages(body: ChatRequest) -> list[dict[str, Any]]:
    """Messages in the form that chat templates read.

    Raises:
        ApiError: a message has an image, or a call of the wrong form.
    """
    result = []
    for index, message in enumerate(body.messages):
        if message.images:
            raise invalid(
                f"messages[{index}].images: this model reads text only; remove the images",
                f"messages[{index}].images",
            )
        fields: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.thinking:
            fields["reasoning_content"] = message.thinking
        if message.tool_calls:
            place = f"messages[{index}].tool_calls"
            fields["tool_calls"] = [_call(call, place) for call in message.tool_calls]
        if name := message.tool_name or message.name:
            fields["name"] = name
        if message.tool_call_id:
            fields["tool_call_id"] = message.tool_call_id
        result.append(fields)
    return result


def _call(call: JsonObject, place: str) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise invalid(f"{place} holds a call without a function's name", place)
    arguments = function.get("arguments", {})
    return {
        "id": str(call.get("id") or ""),
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def to_options(
    body: ChatRequest | GenerateRequest, served: ServedModel, context: RequestContext
) -> Options:
    """Options of the answer.

    Raises:
        ApiError: the context that is asked for is larger than the model's.
    """
    given = body.options or ModelOptions()
    length = served.language_model.context_length
    if given.num_ctx is not None and given.num_ctx > length:
        raise invalid(
            f"options.num_ctx asks for {given.num_ctx} tokens of context; this server has {length}",
            "options.num_ctx",
        )
    for name in _UNSUPPORTED:
        if getattr(given, name) is not None:
            context.warn(f"options.{name} is not supported and was ignored")
    think = body.think if isinstance(body.think, bool) else None
    effort = None if isinstance(body.think, bool) else body.think
    think, effort = effort_switch(effort, think, context)
    limit = given.num_predict
    return Options(
        max_tokens=limit if limit is not None and limit > 0 else None,
        clamp=True,
        stop=stop_strings(given.stop, "options.stop"),
        sampling={
            "temperature": given.temperature,
            "top_k": None if given.top_k is None else max(given.top_k, 0),
            "top_p": positive(given.top_p),
            "min_p": given.min_p,
            "seed": given.seed,
            "repetition_penalty": given.repeat_penalty,
            "presence_penalty": given.presence_penalty,
            "frequency_penalty": given.frequency_penalty,
        },
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        think=think,
        effort=effort,
        form=_form(body.format),
        tools=ToolOptions((body.tools or ()) if isinstance(body, ChatRequest) else ()),
    )


def _form(given: str | JsonObject | None) -> AnswerSchema | None:
    if given is None or given == "":
        return None
    if isinstance(given, dict):
        return AnswerSchema(given, strict=False, param="format")
    if given != "json":
        raise invalid('format is "json" or a JSON schema', "format")
    return AnswerSchema(None, strict=False, param="format")

"""Requests of OpenAI's chat completions: their fields, and their translation."""

from typing import Any, Literal

from mlxarch.generation.thinking.switches import EFFORTS
from mlxarch.server.answers.constraint import AnswerSchema, schema_of
from mlxarch.server.answers.options import Options, logit_bias, stop_strings
from mlxarch.server.answers.tools import (
    ToolOptions,
    arguments_of,
    chosen,
    custom_definition,
)
from mlxarch.server.api.fields import (
    AnswerCount,
    Count,
    JsonObject,
    KeepAlive,
    LogitSampling,
    Strict,
    TopLogprobs,
)
from mlxarch.server.http.context import RequestContext
from mlxarch.server.http.errors import invalid
from mlxarch.server.served_models import ServedModel
from mlxarch.tokenizer.chat_template import RESERVED_VARIABLES

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
_SIGHTLESS = "this model reads text only; remove the part"


class Part(Strict):
    """Part of a message's content."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    cache_control: Any = None


class FunctionCall(Strict):
    """Name and arguments of a call, the arguments as JSON text."""

    name: str
    arguments: str = "{}"


class ToolCall(Strict):
    """Call of a tool in a message of the assistant."""

    function: FunctionCall | None = None
    id: str | None = None
    type: Literal["function", "custom"] | None = "function"
    index: int | None = None
    custom: JsonObject | None = None
    extra_content: Any = None


class Message(Strict):
    """Message of a conversation."""

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None
    reasoning_details: Any = None
    annotations: Any = None
    audio: Any = None


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ResponseFormat(Strict):
    """Form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonObject | None = None


class Reasoning(Strict):
    """Reasoning options as routers of models send them."""

    effort: Effort | None = None
    enabled: bool | None = None
    max_tokens: Count | None = None
    exclude: bool | None = None
    summary: str | None = None


class ChatRequest(LogitSampling):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = []
    model: str | None = None
    max_completion_tokens: Count | None = None
    max_tokens: Count | None = None
    n: AnswerCount | None = None
    stop: str | list[str] | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    response_format: ResponseFormat | None = None
    tools: list[JsonObject] | None = None
    tool_choice: str | JsonObject | None = None
    parallel_tool_calls: bool | None = None
    functions: list[JsonObject] | None = None
    function_call: str | JsonObject | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    reasoning_effort: Effort | None = None
    reasoning: Reasoning | None = None
    think: bool | Effort | None = None
    enable_thinking: bool | None = None
    reasoning_format: Literal["auto", "split", "deepseek", "none", "inline"] | None = None
    chat_template_kwargs: JsonObject | None = None
    prediction: JsonObject | None = None
    keep_alive: KeepAlive = None
    modalities: list[str] | None = None
    audio: JsonObject | None = None
    web_search_options: JsonObject | None = None
    # taken without effect: they ask for nothing that could fail
    verbosity: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    metadata: JsonObject | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: JsonObject | None = None
    cache_prompt: bool | None = None


def text_of(content: str | list[Part] | None, place: str) -> str | None:
    """Text of a message's content.

    Raises:
        ApiError: a part is no text.
    """
    if content is None or isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in ("text", "refusal", "input_text", "output_text"):
            where = f"{place}[{index}].type"
            raise invalid(f"{where} is {part.type!r}: {_SIGHTLESS}", where, "unsupported_value")
        if text is None:
            where = f"{place}[{index}].text"
            raise invalid(f"{where} is missing", where)
        texts.append(text)
    return "".join(texts)


def to_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages in the form that chat templates read.

    Raises:
        ApiError: there are none, or one has no content.
    """
    if not messages:
        raise invalid("messages is empty; a conversation has at least one message", "messages")
    result = []
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        content = text_of(message.content, f"{place}.content")
        calls = _calls(message, place)
        if content is None and not calls and message.refusal is None:
            raise invalid(f"{place}.content is missing", f"{place}.content")
        role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
        fields: dict[str, Any] = {"role": role, "content": content or message.refusal or ""}
        for name in ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking"):
            if (value := getattr(message, name)) is not None:
                fields[name] = value
        if calls:
            fields["tool_calls"] = calls
        result.append(fields)
    return result


def _calls(message: Message, place: str) -> list[dict[str, Any]]:
    """Tool calls of a message, their arguments as JSON text."""
    calls = list(message.tool_calls or ())
    if message.function_call is not None:
        calls.append(ToolCall(message.function_call))
    result = []
    for index, call in enumerate(calls):
        custom = call.custom
        if custom is not None and isinstance(custom.get("name"), str):
            text = arguments_of(str(custom.get("input") or ""))
            call = ToolCall(FunctionCall(custom["name"], text), call.id)
        if call.function is None:
            where = f"{place}.tool_calls[{index}]"
            raise invalid(f"{where} is no call of a function", where, "unsupported_value")
        function = {"name": call.function.name, "arguments": call.function.arguments}
        result.append({"id": call.id or "", "type": "function", "function": function})
    return result


def effort_switch(
    effort: str | None, think: bool | None, context: RequestContext
) -> tuple[bool | None, str | None]:
    """Thinking and its effort as (think, effort) that models know."""
    if effort is None:
        return think, None
    if effort == "none":
        return False, None
    if effort in EFFORTS:
        return think, effort
    nearest = "low" if effort == "minimal" else "high"
    context.warn(f"the reasoning effort {effort} is taken as {nearest}")
    return think, nearest


def template_variables(
    given: JsonObject | None, served: ServedModel
) -> tuple[bool | None, dict[str, Any]]:
    """Split ``chat_template_kwargs`` into the switch for thinking and other variables.

    Raises:
        ApiError: the template does not read a variable.
    """
    variables = dict(given or {})
    think = variables.pop("enable_thinking", None)
    known = served.language_model.tokenizer.template_variables - RESERVED_VARIABLES
    for name in variables:
        if name not in known:
            raise invalid(
                f"the chat template reads no variable {name[:40]!r}; it reads: "
                f"{', '.join(sorted(known)) or 'none'}",
                "chat_template_kwargs",
            )
    return (think if isinstance(think, bool) else None), variables


def to_options(body: ChatRequest, served: ServedModel, context: RequestContext) -> Options:
    """Options of the answers.

    Raises:
        ApiError: two fields contradict each other, or one asks for what the server cannot do.
    """
    _refuse_unsupported(body)
    if body.prediction is not None:
        context.warn("prediction is not used")
    switch, variables = template_variables(body.chat_template_kwargs, served)
    think = body.enable_thinking if body.enable_thinking is not None else switch
    effort: str | None = body.reasoning_effort
    if isinstance(body.think, bool):
        think = body.think
    elif body.think is not None:
        effort = effort or body.think
    if body.reasoning is not None:
        effort = effort or body.reasoning.effort
        think = body.reasoning.enabled if think is None else think
    think, effort = effort_switch(effort, think, context)
    vocab_size = served.running_engine.vocab_size
    sampling = body.sampling()
    if body.logit_bias:
        sampling["logit_bias"] = logit_bias(body.logit_bias, vocab_size)
    return Options(
        max_tokens=body.max_completion_tokens or body.max_tokens,
        min_tokens=body.shortest,
        inline_thinking=body.reasoning_format in ("none", "inline"),
        stop=stop_strings(body.stop),
        sampling=sampling,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        count=body.n or 1,
        think=think,
        effort=effort,
        thinking_budget=body.reasoning.max_tokens if body.reasoning is not None else None,
        variables=variables,
        form=_form(body.response_format),
        tools=_tools(body),
        conversation=body.prompt_cache_key or body.user,
    )


def _tools(body: ChatRequest) -> ToolOptions:
    definitions: list[JsonObject] = []
    for index, tool in enumerate(body.tools or ()):
        kind = tool.get("type", "function")
        place = f"tools[{index}]"
        if kind == "custom":
            if not isinstance(tool.get("custom"), dict):
                raise invalid(f"{place}.custom is missing", f"{place}.custom")
            definitions.append(custom_definition(tool["custom"], f"{place}.custom"))
        elif kind != "function":
            raise invalid(
                f"{place}.type is {kind!r:.40}; it is function or custom", f"{place}.type"
            )
        else:
            definitions.append(tool)
    names = {"function": "function", "allowed_tools": "allowed_tools", "custom": "custom"}
    return chosen(definitions, body.tool_choice, body.parallel_tool_calls, names)


def custom_names(body: ChatRequest) -> frozenset[str]:
    """Names of the tools whose input is text."""
    found = [tool.get("custom") for tool in body.tools or () if tool.get("type") == "custom"]
    return frozenset(str(tool.get("name")) for tool in found if isinstance(tool, dict))


def _form(given: ResponseFormat | None) -> AnswerSchema | None:
    if given is None:
        return None
    details = given.json_schema or {}
    strict = details.get("strict") is True
    param = "response_format"
    return schema_of(given.type, details.get("schema"), strict=strict, param=param)


def _refuse_unsupported(body: ChatRequest) -> None:
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    if body.audio is not None or any(mode != "text" for mode in body.modalities or ()):
        raise invalid("this server answers with text only", "modalities", "unsupported_value")
    if body.web_search_options is not None:
        raise invalid("this server does not search the web", "web_search_options")
    if body.functions is not None or body.function_call is not None:
        raise invalid("functions and function_call are not read; use tools", "functions")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options needs stream: true", "stream_options")

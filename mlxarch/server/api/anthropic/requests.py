"""Requests of Anthropic's messages: their fields, and their translation."""

from typing import Any, Literal

from mlxarch.server.answers.constraint import AnswerSchema, schema_of
from mlxarch.server.answers.options import Options, stop_strings
from mlxarch.server.answers.tools import ToolOptions
from mlxarch.server.api.fields import (
    AnthropicTemperature,
    Count,
    JsonObject,
    Probability,
    Strict,
    TopK,
    positive,
)
from mlxarch.server.api.openai.chat_request import Effort, effort_switch
from mlxarch.server.http.context import RequestContext
from mlxarch.server.http.errors import invalid

MIN_BUDGET = 1024  # tokens of thinking, as at Anthropic
_BILLING = "x-anthropic-billing-header:"
_REMINDER = "<system-reminder>\n{}\n</system-reminder>"
_TEXTLESS = "this model reads text only; remove the block"


class Message(Strict):
    """Turn of a conversation; the system may speak in the middle of one."""

    role: Literal["user", "assistant", "system"]
    content: str | list[JsonObject]


class Thinking(Strict):
    """Switch for thinking."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Count | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputConfig(Strict):
    """Effort and form of the answer."""

    effort: Effort | None = None
    format: JsonObject | None = None
    task_budget: JsonObject | None = None


class CountRequest(Strict):
    """Body of POST /v1/messages/count_tokens."""

    messages: list[Message]
    model: str | None = None
    system: str | list[JsonObject] | None = None
    tools: list[JsonObject] | None = None
    tool_choice: JsonObject | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: JsonObject | None = None
    context_management: JsonObject | None = None
    cache_control: JsonObject | None = None
    mcp_servers: list[JsonObject] | None = None
    speed: str | None = None


class MessagesRequest(CountRequest):
    """Body of POST /v1/messages."""

    max_tokens: Count | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: AnthropicTemperature | None = None
    top_p: Probability | None = None
    top_k: TopK | None = None
    metadata: JsonObject | None = None
    # taken without effect: they ask for nothing that could fail
    service_tier: str | None = None
    container: str | JsonObject | None = None
    inference_geo: str | None = None
    diagnostics: JsonObject | None = None


def to_options(body: MessagesRequest, context: RequestContext) -> Options:
    """Options of the answer.

    Raises:
        ApiError: ``max_tokens`` is missing, or two fields contradict each other.
    """
    if body.max_tokens is None:
        raise invalid("max_tokens is missing", "max_tokens")
    think, effort = thinking_of(body, context)
    _warn_of_edits(body.context_management, context)
    if body.mcp_servers:
        context.warn("mcp_servers: this server calls no tools by itself; they are left out")
    sampling = {"temperature": body.temperature, "top_p": positive(body.top_p)}
    sampling["top_k"] = None if body.top_k is None else max(body.top_k, 0)
    user = (body.metadata or {}).get("user_id")
    return Options(
        max_tokens=body.max_tokens,
        clamp=True,
        stop=stop_strings(body.stop_sequences, "stop_sequences"),
        sampling=sampling,
        think=think,
        effort=effort,
        thinking_budget=body.thinking.budget_tokens if body.thinking is not None else None,
        form=_form(body),
        tools=tools_of(body, context),
        conversation=user if isinstance(user, str) else None,
    )


def _warn_of_edits(management: JsonObject | None, context: RequestContext) -> None:
    """Warn of edits of the conversation that are not made."""
    edits = (management or {}).get("edits")
    for edit in edits if isinstance(edits, list) else ():
        kind = str(edit.get("type")) if isinstance(edit, dict) else ""
        keeps = kind.startswith("clear_thinking_") and edit.get("keep") == "all"
        if not keeps:
            context.warn(f"context_management: the edit {kind!r:.60} is not made")


def tools_of(body: CountRequest, context: RequestContext) -> ToolOptions:
    """Tools of a request; those that Anthropic's servers run are left out.

    Raises:
        ApiError: a tool or the choice is of the wrong form.
    """
    definitions = []
    for index, tool in enumerate(body.tools or ()):
        if tool.get("type") not in (None, "custom"):
            context.warn(f"tools[{index}], {tool.get('type')!r:.40}, is no function: left out")
            continue
        function = {
            "name": tool.get("name"),
            "description": tool.get("description") or "",
            "parameters": tool.get("input_schema") or {},
            "strict": tool.get("strict") is True,
        }
        definitions.append({"type": "function", "function": function})
    given = body.tool_choice or {}
    kind = str(given.get("type", "auto"))
    choices = {"auto": "auto", "any": "required", "none": "none", "tool": given.get("name")}
    if kind not in choices or not isinstance(choices[kind], str):
        raise invalid("tool_choice.type is auto, any, tool (with a name) or none", "tool_choice")
    parallel = given.get("disable_parallel_tool_use") is not True
    return ToolOptions(definitions, str(choices[kind]), parallel)


def _form(body: CountRequest) -> AnswerSchema | None:
    config = body.output_config
    given = body.output_format if config is None or config.format is None else config.format
    if given is None:
        return None
    kind = str(given.get("type", ""))
    param = "output_config.format"
    return schema_of(kind, given.get("schema"), strict=False, param=param)


def thinking_of(body: CountRequest, context: RequestContext) -> tuple[bool | None, str | None]:
    """Thinking and its effort, as ``Options`` has them."""
    think: bool | None = None
    if body.thinking is not None and body.thinking.type != "adaptive":
        think = body.thinking.type == "enabled"
        limit = body.max_tokens if isinstance(body, MessagesRequest) else None
        budget = body.thinking.budget_tokens
        if body.thinking.type == "enabled" and (budget is None or budget < MIN_BUDGET):
            raise invalid(
                f"thinking.budget_tokens must be at least {MIN_BUDGET}", "thinking.budget_tokens"
            )
        if budget is not None and limit is not None and budget >= limit:
            raise invalid("thinking.budget_tokens must be below max_tokens", "thinking")
    effort = body.output_config.effort if body.output_config is not None else None
    return effort_switch(effort, think, context)


def to_messages(body: CountRequest, context: RequestContext) -> list[dict[str, Any]]:
    """Messages in the form that chat templates read.

    Raises:
        ApiError: a block is of a kind that the model cannot read.
    """
    if not body.messages:
        raise invalid("messages is empty; a conversation has at least one message", "messages")
    result: list[dict[str, Any]] = []
    if system := _system_text(body.system, context):
        result.append({"role": "system", "content": system})
    for index, message in enumerate(body.messages):
        place = f"messages[{index}].content"
        if message.role == "assistant":
            result.append(_assistant(message.content, place))
        elif message.role == "system":
            text = "\n\n".join(_texts(message.content, place))
            result.append({"role": "user", "content": _REMINDER.format(text)})
        else:
            result += _user(message.content, place)
    return _joined_turns(result)


def _system_text(system: str | list[JsonObject] | None, context: RequestContext) -> str:
    """Text of the system prompt, without a line that differs in every request."""
    texts = [] if system is None else _texts(system, "system")
    kept = [text for text in texts if not text.startswith(_BILLING)]
    if len(kept) < len(texts):
        context.warn(
            "the system prompt's x-anthropic-billing-header was left out: it changes with every "
            "request, so that nothing behind it could be reused"
        )
    return "\n\n".join(kept)


def _blocks(content: str | list[JsonObject]) -> list[JsonObject]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _texts(content: str | list[JsonObject], place: str) -> list[str]:
    """Texts of blocks that must be text."""
    texts = []
    for index, block in enumerate(_blocks(content)):
        where = f"{place}[{index}]"
        match block.get("type"):
            case "text":
                texts.append(_string(block, "text", where))
            case "search_result":
                texts.append(_search_result(block, where))
            case "tool_reference":
                texts.append(f"Tool: {_string(block, 'tool_name', where)}")
            case kind:
                raise invalid(f"{kind!r:.40} cannot be read: {_TEXTLESS}", f"{where}.type")
    return texts


def _search_result(block: JsonObject, place: str) -> str:
    """Text of a search result: title, source, and the parts that were found."""
    head = f"{_string(block, 'title', place)}\n{_string(block, 'source', place)}"
    content = block.get("content")
    if not isinstance(content, list):
        raise invalid("content is missing, or no list of text blocks", f"{place}.content")
    return "\n".join([head, *_texts(content, f"{place}.content")])


def _string(block: JsonObject, name: str, place: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise invalid(f"{name} is missing, or no text", f"{place}.{name}")
    return value


def _assistant(content: str | list[JsonObject], place: str) -> dict[str, Any]:
    texts: list[str] = []
    thinking: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, block in enumerate(_blocks(content)):
        where = f"{place}[{index}]"
        match block.get("type"):
            case "text":
                texts.append(_string(block, "text", where))
            case "thinking":
                thinking.append(_string(block, "thinking", where))
            case "redacted_thinking":
                pass
            case "tool_use":
                arguments = block.get("input")
                if not isinstance(arguments, dict):
                    raise invalid("input is missing, or no object", f"{where}.input")
                function = {"name": _string(block, "name", where), "arguments": arguments}
                call = {"id": _call_id(_string(block, "id", where)), "type": "function"}
                calls.append(call | {"function": function})
            case kind:
                raise invalid(f"{kind!r:.40} cannot be read: {_TEXTLESS}", f"{where}.type")
    message: dict[str, Any] = {"role": "assistant", "content": "\n\n".join(texts)}
    if any(thinking):
        message["reasoning_content"] = "\n\n".join(thinking)
    if calls:
        message["tool_calls"] = calls
    return message


def _call_id(id: str) -> str:
    """Identifier as it was before it was given the form of this API, so that prompts are the same."""
    return f"call_{id.removeprefix('toolu_')}" if id.startswith("toolu_") else id


def _user(content: str | list[JsonObject], place: str) -> list[dict[str, Any]]:
    """Results of tools as turns of their own, then the user's text."""
    results = []
    texts: list[str] = []
    for index, block in enumerate(_blocks(content)):
        where = f"{place}[{index}]"
        if block.get("type") != "tool_result":
            texts += _texts([block], place)
            continue
        given = block.get("content")
        parts = [] if given is None else _texts(given, f"{where}.content")
        text = "\n".join(parts)
        if block.get("is_error") is True:
            text = f"Error: {text}"
        tool_call_id = _call_id(_string(block, "tool_use_id", where))
        results.append({"role": "tool", "tool_call_id": tool_call_id, "content": text})
    if not results and not any(texts):
        raise invalid("the content is empty; a turn of the user has text or results", place)
    if texts:
        results.append({"role": "user", "content": "\n\n".join(texts)})
    return results


def _joined_turns(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join neighbouring turns of the user, since many templates want turns to alternate."""
    result: list[dict[str, Any]] = []
    for message in messages:
        if result and message["role"] == result[-1]["role"] == "user":
            content = f"{result[-1]['content']}\n\n{message['content']}"
            result[-1] = {**result[-1], "content": content}
        else:
            result.append(message)
    return result

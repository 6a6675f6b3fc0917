"""Requests of OpenAI's responses: their fields, and their translation."""

import base64
import binascii
import secrets
from collections.abc import Mapping
from typing import Any, Literal

from mlxarch.server.answers.constraint import AnswerSchema, schema_of
from mlxarch.server.answers.options import Options
from mlxarch.server.answers.tools import (
    ToolOptions,
    arguments_of,
    chosen,
    custom_definition,
)
from mlxarch.server.api.fields import (
    Count,
    JsonObject,
    OpenAITemperature,
    Probability,
    Strict,
    TopLogprobs,
    positive,
)
from mlxarch.server.api.openai.chat_request import Effort, effort_switch
from mlxarch.server.http.context import RequestContext
from mlxarch.server.http.errors import invalid

_INCLUDABLE = (
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
    # parts of items that this server never makes
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
)
_ID_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}
_TEXT_PARTS = ("input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text")


class Reasoning(Strict):
    """Reasoning options."""

    effort: Effort | None = None
    summary: str | None = None
    generate_summary: str | None = None
    context: str | None = None


class TextOptions(Strict):
    """Form of the answer."""

    format: JsonObject | None = None
    verbosity: str | None = None


class ResponsesRequest(Strict):
    """Body of POST /v1/responses."""

    input: str | list[JsonObject] | None = None
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: JsonObject | None = None
    tools: list[JsonObject] | None = None
    tool_choice: str | JsonObject | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    max_output_tokens: Count | None = None
    temperature: OpenAITemperature | None = None
    top_p: Probability | None = None
    top_logprobs: TopLogprobs | None = None
    truncation: Literal["auto", "disabled"] | None = None
    # refused unless null
    background: bool | None = None
    prompt: JsonObject | None = None
    conversation: str | JsonObject | None = None
    max_tool_calls: int | None = None
    context_management: Any = None
    # taken without effect: they ask for nothing that could fail
    metadata: JsonObject | None = None
    user: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: JsonObject | None = None
    client_metadata: JsonObject | None = None


def check(body: ResponsesRequest) -> None:
    """Refuse what is not supported.

    Raises:
        ApiError: a field asks for it.
    """
    for name in ("background", "prompt", "conversation", "max_tool_calls", "context_management"):
        if getattr(body, name):
            raise invalid(f"{name} is not supported; leave it out", name, "unsupported_value")
    for name in body.include or ():
        if name not in _INCLUDABLE:
            allowed = ", ".join(_INCLUDABLE)
            raise invalid(f"include holds {name!r:.80}; allowed are {allowed}", "include")
    if body.input is None and body.previous_response_id is None:
        raise invalid("input is missing: a text, or a list of items", "input")


def to_options(body: ResponsesRequest, context: RequestContext) -> Options:
    """Options of the answer."""
    effort = body.reasoning.effort if body.reasoning is not None else None
    think, level = effort_switch(effort, None, context)
    wanted = "message.output_text.logprobs" in (body.include or ())
    top = body.top_logprobs if body.top_logprobs is not None else 0
    return Options(
        max_tokens=body.max_output_tokens,
        sampling={"temperature": body.temperature, "top_p": positive(body.top_p)},
        top_logprobs=top if wanted or body.top_logprobs else None,
        think=think,
        effort=level,
        form=_form(body.text),
        tools=_tools(body, context),
        conversation=body.prompt_cache_key or body.user,
        prompt_param="input",
    )


def _tools(body: ResponsesRequest, context: RequestContext) -> ToolOptions:
    """Tools of a request; those that OpenAI's servers run are left out.

    Functions of a namespace are called NAMESPACE.NAME.
    """
    definitions: list[JsonObject] = []
    for index, tool in enumerate(body.tools or ()):
        kind = tool.get("type")
        if kind == "function":
            definitions.append(_definition(tool, "", f"tools[{index}]"))
        elif kind == "namespace":
            listed = tool.get("tools")
            inner = listed if isinstance(listed, list) else []
            prefix = f"{tool.get('name')}."
            place = f"tools[{index}].tools"
            definitions += [
                _definition(each, prefix, f"{place}[{number}]")
                for number, each in enumerate(inner)
                if isinstance(each, dict)
            ]
        elif kind == "custom":
            definitions.append(custom_definition(tool, f"tools[{index}]"))
        else:
            context.warn(f"tools[{index}], {kind!r:.40}, is no function: left out")
    names = {"function": "", "allowed_tools": "", "custom": ""}
    return chosen(definitions, body.tool_choice, body.parallel_tool_calls, names)


def _definition(tool: JsonObject, prefix: str, place: str) -> JsonObject:
    name = tool.get("name")
    if not isinstance(name, str):
        raise invalid(f"{place}.name is missing, or no text", f"{place}.name")
    function = {
        "name": f"{prefix}{name}",
        "description": tool.get("description") or "",
        "parameters": tool.get("parameters") or {},
        "strict": tool.get("strict") is True,
    }
    return {"type": "function", "function": function}


def custom_names(body: ResponsesRequest) -> frozenset[str]:
    """Names of the tools whose input is text."""
    found = [tool for tool in body.tools or () if tool.get("type") == "custom"]
    return frozenset(str(tool.get("name")) for tool in found)


def namespaces(body: ResponsesRequest) -> frozenset[str]:
    """Names of the namespaces whose functions a request offers."""
    spaces = [tool for tool in body.tools or () if tool.get("type") == "namespace"]
    return frozenset(str(tool.get("name")) for tool in spaces)


def _form(text: TextOptions | None) -> AnswerSchema | None:
    given = text.format if text is not None else None
    if given is None:
        return None
    kind = str(given.get("type", ""))
    strict = given.get("strict") is True
    return schema_of(kind, given.get("schema"), strict=strict, param="text.format")


def input_items(body: ResponsesRequest) -> list[JsonObject]:
    """Items of the input; a text is a message of the user."""
    if isinstance(body.input, str):
        part = {"type": "input_text", "text": body.input}
        return [{"type": "message", "role": "user", "content": [part]}]
    return body.input or []


def with_ids(items: list[JsonObject]) -> list[JsonObject]:
    """Items that all have a kind and an identifier, by which later requests may name them."""
    result = []
    for item in items:
        kind = item.get("type", "message" if "role" in item else None)
        named = isinstance(item.get("id"), str)
        if not isinstance(kind, str) or kind == "item_reference" or named:
            result.append(item)
            continue
        prefix = _ID_PREFIXES.get(kind, "item")
        result.append({**item, "type": kind, "id": f"{prefix}_{secrets.token_hex(16)}"})
    return result


def to_messages(
    items: list[JsonObject], stored: Mapping[str, JsonObject], place: str = "input"
) -> list[dict[str, Any]]:
    """Messages in the form that chat templates read.

    Args:
        items: items of the conversation.
        stored: items of stored responses by id, to which others may refer.
        place: path of the items in the request.

    Raises:
        ApiError: an item is of a kind that the model cannot read.
    """
    result: list[dict[str, Any]] = []
    reasoning = ""
    for index, item in enumerate(items):
        where = f"{place}[{index}]"
        if item.get("type") == "item_reference":
            item = _referenced(item, stored, where)
        kind = item.get("type", "message" if "role" in item else None)
        if kind == "reasoning":
            reasoning = _reasoning_text(item, where)
        elif kind in ("function_call", "custom_tool_call"):
            _add_call(result, item, reasoning, where)
            reasoning = ""
        elif kind in ("function_call_output", "custom_tool_call_output"):
            content = _content(item.get("output"), f"{where}.output")
            call_id = item.get("call_id")
            if not isinstance(call_id, str):
                raise invalid(f"{where}.call_id is missing, or no text", f"{where}.call_id")
            result.append({"role": "tool", "tool_call_id": call_id, "content": content})
        elif kind == "message":
            result.append(_message(item, reasoning, where))
            reasoning = ""
        else:
            raise invalid(f"{where}.type is {kind!r:.40}, which is not supported", f"{where}.type")
    return result


def _referenced(item: JsonObject, stored: Mapping[str, JsonObject], where: str) -> JsonObject:
    found = stored.get(str(item.get("id")))
    if found is None:
        raise invalid(f"{where}.id names no stored item", f"{where}.id")
    return found


def _message(item: JsonObject, reasoning: str, where: str) -> dict[str, Any]:
    role = item.get("role")
    if role not in ("user", "assistant", "system", "developer"):
        raise invalid(f"{where}.role is {role!r:.40}", f"{where}.role")
    content = _content(item.get("content"), f"{where}.content")
    message = {"role": "system" if role == "developer" else role, "content": content}
    return message | ({"reasoning_content": reasoning} if reasoning else {})


def _add_call(messages: list[dict[str, Any]], item: JsonObject, reasoning: str, where: str) -> None:
    """Add a call to the turn of the assistant that it belongs to."""
    name = item.get("name")
    arguments = item.get("arguments")
    if item.get("type") == "custom_tool_call" and isinstance(item.get("input"), str):
        arguments = arguments_of(item["input"])
    if not isinstance(name, str) or not isinstance(arguments, str):
        raise invalid(f"{where} lacks its name, or its arguments or input, which are texts", where)
    if namespace := item.get("namespace"):
        name = f"{namespace}.{name}"
    function = {"name": name, "arguments": arguments}
    call = {"id": str(item.get("call_id", "")), "type": "function", "function": function}
    if messages and messages[-1]["role"] == "assistant":
        last = messages[-1]
        messages[-1] = {**last, "tool_calls": [*last.get("tool_calls", ()), call]}
        return
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    messages.append(message | ({"reasoning_content": reasoning} if reasoning else {}))


def _content(content: Any, where: str) -> str:
    """Text of a content: a text, or a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(f"{where} is missing: a text, or a list of parts", where)
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS:
            place = f"{where}[{index}].type"
            raise invalid(
                f"{place} is {kind!r:.40}: this model reads text only; remove the part", place
            )
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise invalid(f"{where}[{index}].text is missing", f"{where}[{index}].text")
        texts.append(text)
    return "\n".join(texts)


def _reasoning_text(item: JsonObject, where: str) -> str:
    """Text of a reasoning item: as it is, or from the content that only this server reads."""
    for name in ("content", "summary"):
        if item.get(name):
            return _content(item[name], f"{where}.{name}")
    sealed = item.get("encrypted_content")
    if not isinstance(sealed, str):
        return ""
    try:
        return base64.b64decode(sealed, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""  # of another server

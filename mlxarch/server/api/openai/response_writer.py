"""Output items of a response, and the events that build them."""

import base64
import secrets
import time
from collections.abc import Collection
from typing import Any

from mlxarch.generation.logprobs import TokenLogprobs
from mlxarch.server.answers.events import Delta, End, Usage
from mlxarch.server.answers.tools import input_of
from mlxarch.server.api.openai.chat import token_object
from mlxarch.tokenizer.tokenizer import Tokenizer
from mlxarch.tool_calls.events import CallArguments, CallStarted

JsonEvent = dict[str, Any]


def usage_object(usage: Usage) -> dict[str, Any]:
    """Usage in the form of responses."""
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.answer,
        "output_tokens_details": {"reasoning_tokens": usage.thinking},
        "total_tokens": usage.prompt + usage.answer,
    }


class ResponseWriter:
    """One response: events in, the events of its stream out.

    Args:
        response: the response object, without output.
        tokenizer: tokenizer of the model.
        summarize: whether reasoning is given as its summary.
        seal: whether reasoning items carry their text for clients that keep no items.
        namespaces: namespaces of functions; a call of NAMESPACE.NAME is given with both apart.
        custom: names of tools whose input is text.

    Attributes:
        response: the response object so far.
    """

    def __init__(
        self,
        response: dict[str, Any],
        tokenizer: Tokenizer,
        *,
        summarize: bool,
        seal: bool,
        namespaces: Collection[str] = (),
        custom: Collection[str] = (),
    ) -> None:
        self.response = response
        self._tokenizer = tokenizer
        self._summarize = summarize
        self._seal = seal
        self._namespaces = namespaces
        self._custom = custom
        self._number = 0
        self._item: dict[str, Any] | None = None
        self._text = ""
        self._logprobs: list[dict[str, Any]] = []

    def begin(self) -> list[JsonEvent]:
        """Events before the first item."""
        return [
            self._event(kind, response=dict(self.response))
            for kind in ("response.created", "response.in_progress")
        ]

    def add(self, event: Delta) -> list[JsonEvent]:
        """Events for text of the answer or of the thinking."""
        kind = "reasoning" if event.thinking else "message"
        events: list[JsonEvent] = []
        if self._item is None or self._item["type"] != kind:
            events += self.close_item()
            events += self._open_reasoning() if event.thinking else self._open_message()
        self._text += event.text
        if event.thinking:
            name = "reasoning_summary_text" if self._summarize else "reasoning_text"
            return [*events, self._part_event(f"response.{name}.delta", delta=event.text)]
        logprobs = self._entries(event.logprobs)
        self._logprobs += logprobs
        delta = self._part_event("response.output_text.delta", delta=event.text, logprobs=logprobs)
        return [*events, delta]

    def add_call(self, event: CallStarted | CallArguments) -> list[JsonEvent]:
        """Events for a call of a tool."""
        if isinstance(event, CallArguments):
            self._text += event.text
            if self._item is not None and self._item["type"] == "custom_tool_call":
                return []  # the text within JSON is known at its end
            kind = "response.function_call_arguments.delta"
            return [self._call_event(kind, delta=event.text)]
        if event.name in self._custom:
            item = {
                "id": _new_id("ctc"),
                "type": "custom_tool_call",
                "call_id": event.id,
                "name": event.name,
                "input": "",
                "status": "in_progress",
            }
            return [*self.close_item(), self._open_item(item)]
        space, dot, name = event.name.partition(".")
        known = bool(dot) and space in self._namespaces
        item = {
            "id": _new_id("fc"),
            "type": "function_call",
            "call_id": event.id,
            "name": name if known else event.name,
            "arguments": "",
            "status": "in_progress",
        }
        return [*self.close_item(), self._open_item(item | ({"namespace": space} if known else {}))]

    def _call_event(self, kind: str, **fields: Any) -> JsonEvent:
        item_id = self._item["id"] if self._item is not None else ""
        return self._event(kind, item_id=item_id, **self._place(), **fields)

    def finish(self, end: End, usage: Usage) -> list[JsonEvent]:
        """Events that end the response."""
        complete = end.reason != "length"
        events = self.close_item("completed" if complete else "incomplete")
        self.response["usage"] = usage_object(usage)
        self.response["status"] = "completed" if complete else "incomplete"
        if complete:
            self.response["completed_at"] = int(time.time())
        else:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        return [*events, self._event(f"response.{self.response['status']}", response=self.response)]

    def fail(self, code: str, message: str) -> JsonEvent:
        """Event that ends the response with an error."""
        self.response["status"] = "failed"
        self.response["error"] = {"code": code, "message": message}
        return self._event("response.failed", response=self.response)

    def close_item(self, status: str = "completed") -> list[JsonEvent]:
        """Events that end the open item."""
        item = self._item
        if item is None:
            return []
        events = self._close_text(item)
        if "status" in item:
            item["status"] = status
        events.append(self._event("response.output_item.done", **self._place(), item=item))
        self._item = None
        self._text = ""
        self._logprobs = []
        return events

    def _close_text(self, item: dict[str, Any]) -> list[JsonEvent]:
        """Events that end the text of a message or of reasoning, or the arguments of a call."""
        if item["type"] == "function_call":
            item["arguments"] = self._text or "{}"
            kind = "response.function_call_arguments.done"
            return [self._call_event(kind, name=item["name"], arguments=item["arguments"])]
        if item["type"] == "custom_tool_call":
            item["input"] = input_of(self._text)
            name = "response.custom_tool_call_input"
            return [
                self._call_event(f"{name}.delta", delta=item["input"]),
                self._call_event(f"{name}.done", input=item["input"]),
            ]
        if item["type"] == "message":
            part = {
                "type": "output_text",
                "text": self._text,
                "annotations": [],
                "logprobs": self._logprobs,
            }
            item["content"] = [part]
            done = self._part_event(
                "response.output_text.done", text=self._text, logprobs=self._logprobs
            )
            return [done, self._part_event("response.content_part.done", part=part)]
        if self._seal:
            item["encrypted_content"] = base64.b64encode(self._text.encode()).decode()
        if self._summarize:
            part = {"type": "summary_text", "text": self._text}
            item["summary"] = [part]
            done = self._part_event("response.reasoning_summary_text.done", text=self._text)
            return [done, self._part_event("response.reasoning_summary_part.done", part=part)]
        item["content"] = [{"type": "reasoning_text", "text": self._text}]
        return [self._part_event("response.reasoning_text.done", text=self._text)]

    def _open_message(self) -> list[JsonEvent]:
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        added = self._open_item(
            {"id": _new_id("msg"), "type": "message", "role": "assistant", "content": []}
            | {"status": "in_progress"}
        )
        return [added, self._part_event("response.content_part.added", part=part)]

    def _open_reasoning(self) -> list[JsonEvent]:
        item: dict[str, Any] = {"id": _new_id("rs"), "type": "reasoning", "summary": []}
        if not self._summarize:
            item["content"] = []
        added = self._open_item(item)
        if not self._summarize:
            return [added]
        part = {"type": "summary_text", "text": ""}
        return [added, self._part_event("response.reasoning_summary_part.added", part=part)]

    def _open_item(self, item: dict[str, Any]) -> JsonEvent:
        self._item = item
        self.response["output"].append(item)
        return self._event("response.output_item.added", **self._place(), item=dict(item))

    def _place(self) -> dict[str, int]:
        return {"output_index": len(self.response["output"]) - 1}

    def _part_event(self, kind: str, **fields: Any) -> JsonEvent:
        """Event about the only part of the open item."""
        index = "summary_index" if "_summary_" in kind else "content_index"
        item_id = self._item["id"] if self._item is not None else ""
        return self._event(kind, item_id=item_id, **self._place(), **{index: 0}, **fields)

    def _event(self, kind: str, **fields: Any) -> JsonEvent:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return event

    def _entries(self, entries: tuple[TokenLogprobs, ...]) -> list[dict[str, Any]]:
        return [
            {
                **token_object(self._tokenizer, entry.token, entry.logprob),
                "top_logprobs": [token_object(self._tokenizer, *each) for each in entry.top],
            }
            for entry in entries
        ]


def _new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"

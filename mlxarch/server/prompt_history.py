"""Latest prompts, so that a later request can be told why the prefix cache held so little of it."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np

Reason = Literal[
    "model_changed", "system_changed", "tools_changed", "messages_changed", "effort_changed"
]

_MAX_PROMPTS = 256
_MAX_BYTES = 64 * 2**20
_SHOWN = 40  # characters of a text that differs
_END_TOKENS = 16  # of a prompt that ask for the answer; the next turn may begin it otherwise


@dataclass(frozen=True)
class PromptRecord:
    """Prompt of a request, in the parts of which a change is told.

    Attributes:
        model: name of the model.
        system: text of the system prompt.
        tools: JSON text of each tool.
        messages: JSON text of each other message.
        effort: switches for thinking.
        tokens: token ids (n,).
    """

    model: str
    system: str
    tools: tuple[str, ...]
    messages: tuple[str, ...]
    effort: tuple[object, ...]
    tokens: np.ndarray

    @classmethod
    def of(
        cls,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        effort: tuple[object, ...],
        tokens: Sequence[int],
    ) -> "PromptRecord":
        """Build the record of a conversation."""
        has_system = bool(messages) and messages[0].get("role") == "system"
        return cls(
            model,
            str(messages[0].get("content")) if has_system else "",
            tuple(map(_text, tools)),
            tuple(map(_text, messages[1:] if has_system else messages)),
            effort,
            np.asarray(tokens, np.int32),
        )

    @property
    def nbytes(self) -> int:
        """Approximate bytes of memory."""
        texts = sum(map(len, (self.system, *self.tools, *self.messages)))
        return texts + self.tokens.nbytes


@dataclass(frozen=True)
class Change:
    """First difference between a prompt and an earlier one.

    Attributes:
        reason: part that differs; None if it is none that is known, such as a turn that the chat
            template renders otherwise once others follow.
        missed: tokens of the earlier prompt that could not be reused.
        reusable: tokens that both begin with.
        sentence: place and text of the difference.
    """

    reason: Reason | None
    missed: int
    reusable: int
    sentence: str


def compare(before: PromptRecord, now: PromptRecord) -> Change | None:
    """Find the first difference; None if the prompt goes on where the earlier one ended."""
    shorter = min(len(before.tokens), len(now.tokens))
    differing = np.flatnonzero(before.tokens[:shorter] != now.tokens[:shorter])
    reusable = int(differing[0]) if differing.size else shorter
    if before.model != now.model:
        reusable = 0
    missed = len(before.tokens) - reusable
    reason, place = _difference(before, now)
    if reason is None and missed <= _END_TOKENS:
        return None
    return Change(reason, missed, reusable, f"{place}; {missed} tokens are read anew")


def _difference(before: PromptRecord, now: PromptRecord) -> tuple[Reason | None, str]:
    """The part that differs first, and a description with both texts."""
    if before.model != now.model:
        return "model_changed", f"model: {_quoted(before.model, now.model, 0)}"
    if before.system != now.system:
        return "system_changed", _place("system", before.system, now.system)
    if before.tools != now.tools:
        return "tools_changed", _first("tools", before.tools, now.tools)
    if before.messages != now.messages[: len(before.messages)]:
        return "messages_changed", _first("messages", before.messages, now.messages)
    if before.effort != now.effort:
        return "effort_changed", f"switches for thinking: {now.effort} was {before.effort}"
    return None, "the chat template renders an earlier turn otherwise once others follow"


def _first(name: str, before: Sequence[str], now: Sequence[str]) -> str:
    """Describe the first entry of a list that differs."""
    count = min(len(before), len(now))
    index = next((n for n in range(count) if before[n] != now[n]), count)
    old = before[index] if index < len(before) else ""
    new = now[index] if index < len(now) else ""
    return _place(f"{name}[{index}]", old, new)


def _place(name: str, before: str, now: str) -> str:
    shorter = min(len(before), len(now))
    at = next((n for n in range(shorter) if before[n] != now[n]), shorter)
    return f"{name}, character {at}: {_quoted(before, now, at)}"


def _quoted(before: str, now: str, at: int) -> str:
    return f"«{now[at : at + _SHOWN]}» was «{before[at : at + _SHOWN]}»"


def _text(value: Mapping[str, Any]) -> str:
    return msgspec.json.encode(value).decode()


class PromptHistory:
    """The latest prompts by the id of their answers, in memory."""

    def __init__(self) -> None:
        self._records: OrderedDict[str, PromptRecord] = OrderedDict()
        self._bytes = 0

    def add(self, id: str, record: PromptRecord) -> None:
        """Keep a prompt, and forget the oldest where there are too many."""
        self._records[id] = record
        self._bytes += record.nbytes
        while len(self._records) > _MAX_PROMPTS or self._bytes > _MAX_BYTES:
            _, dropped = self._records.popitem(last=False)
            self._bytes -= dropped.nbytes

    def find(self, id: str) -> PromptRecord | None:
        """Return a prompt; None if it is not known any more."""
        return self._records.get(id)

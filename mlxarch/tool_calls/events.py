"""Events of a streamed answer that calls functions."""

import json
import secrets
import string
from dataclasses import dataclass
from typing import Any

from mlxarch.errors import InvalidInput

_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class CallStarted:
    """A call whose function is known.

    Attributes:
        index: number of the call in the answer, from 0 on.
        id: identifier, which the function's result refers to.
        name: name of the function.
    """

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """Part of a call's arguments; the parts together are a JSON object.

    Attributes:
        index: number of the call.
        text: JSON text to append.
    """

    index: int
    text: str


@dataclass(frozen=True)
class CallFinished:
    """A complete call, with sound arguments."""

    index: int


@dataclass(frozen=True)
class CallFailed:
    """A started call that turned out to be broken or cut off.

    Attributes:
        index: number of the call.
        text: all that the model wrote for it, to be shown as part of the answer.
        reason: what is wrong.
    """

    index: int
    text: str
    reason: str


CallEvent = CallStarted | CallArguments | CallFinished | CallFailed


@dataclass(frozen=True)
class ToolCall:
    """Call of a function, as a model wrote it.

    Attributes:
        id: identifier, which ``result`` refers to.
        name: name of the function.
        arguments: arguments by name.
        text: the arguments as JSON text, as the model wrote them.
    """

    id: str
    name: str
    arguments: dict[str, Any]
    text: str

    @property
    def message(self) -> dict[str, Any]:
        """The call as an entry of ``tool_calls`` in a message of the assistant."""
        function = {"name": self.name, "arguments": self.text}
        return {"id": self.id, "type": "function", "function": function}

    def result(self, value: Any) -> dict[str, Any]:
        """Build the message with the function's result, for the next turn.

        Args:
            value: a text, or a value that is written as JSON.
        """
        try:
            content = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        except TypeError as problem:
            raise InvalidInput(
                f"the result of {self.name} is neither text nor JSON: {problem}"
            ) from None
        return {"role": "tool", "tool_call_id": self.id, "name": self.name, "content": content}


def new_call_id(prefix: str = "call_", length: int = 24) -> str:
    """Return an identifier for a call: a prefix, then random letters and digits."""
    return prefix + "".join(secrets.choice(_LETTERS) for _ in range(length))


class CallWriter:
    """Events of the calls of one answer, in order; arguments are checked at the end of each call.

    Attributes:
        open: whether a call has started and not ended.
        count: number of calls that have started.
    """

    def __init__(self, id_prefix: str = "call_", id_length: int = 24) -> None:
        self._id = (id_prefix, id_length)
        self._arguments = ""
        self.open = False
        self.count = 0

    def start(self, name: str, id: str | None = None) -> CallStarted:
        """Start a call.

        Args:
            name: name of the function.
            id: identifier that the model gave to the call; None makes one.
        """
        self.open = True
        self._arguments = ""
        self.count += 1
        return CallStarted(self.count - 1, id or new_call_id(*self._id), name)

    def arguments(self, text: str) -> CallArguments:
        """Append to the arguments of the call."""
        self._arguments += text
        return CallArguments(self.count - 1, text)

    def finish(self, written: str) -> CallFinished | CallFailed:
        """End the call.

        Args:
            written: all that the model wrote for the call, in case that its arguments are broken.
        """
        try:
            value = json.loads(self._arguments or "{}")
        except (ValueError, RecursionError) as problem:
            return self.fail(written, f"its arguments are not JSON: {problem}")
        if not isinstance(value, dict):
            return self.fail(written, "its arguments are no JSON object")
        self.open = False
        return CallFinished(self.count - 1)

    def fail(self, written: str, reason: str) -> CallFailed:
        """Give a started call up."""
        self.open = False
        return CallFailed(self.count - 1, written, reason)

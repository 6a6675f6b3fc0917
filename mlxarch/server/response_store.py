"""Stored responses, which later turns may continue."""

import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import msgspec

JsonObject = dict[str, Any]

_MAX_STORED = 256
_MAX_BYTES = 64 * 2**20  # of all stored conversations as JSON
_STORED_SECONDS = 3600.0


@dataclass
class StoredResponse:
    """Response that later turns may continue.

    Attributes:
        response: the response object.
        items: items of the conversation up to it, its own output included.
        inputs: items of its own input.
        until: value of ``time.monotonic`` after which it is forgotten.
    """

    response: dict[str, Any]
    items: list[JsonObject]
    inputs: list[JsonObject]
    until: float = field(default_factory=lambda: time.monotonic() + _STORED_SECONDS)

    def __post_init__(self) -> None:
        self.size = len(msgspec.json.encode(self.items))


class ResponseStore:
    """The latest responses, in memory."""

    def __init__(self) -> None:
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()
        self._size = 0

    def add(self, stored: StoredResponse) -> None:
        """Keep a response, and forget the oldest where there are too many."""
        self._stored[stored.response["id"]] = stored
        self._size += stored.size
        while len(self._stored) > _MAX_STORED or self._size > _MAX_BYTES:
            self.remove(next(iter(self._stored)))

    def find(self, id: str) -> StoredResponse | None:
        """Return a response; None if there is none, or it is too old."""
        stored = self._stored.get(id)
        if stored is not None and stored.until < time.monotonic():
            self.remove(id)
            return None
        return stored

    def remove(self, id: str) -> None:
        """Forget a response."""
        self._size -= self._stored.pop(id).size

    def items(self) -> dict[str, JsonObject]:
        """Items of all responses by id."""
        return {
            item["id"]: item
            for stored in self._stored.values()
            for item in stored.items
            if isinstance(item.get("id"), str)
        }

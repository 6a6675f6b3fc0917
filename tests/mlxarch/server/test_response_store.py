"""Stored responses: how many, how large, how long."""

import time

from mlxarch.server import response_store
from mlxarch.server.response_store import ResponseStore, StoredResponse


def stored(id: str, text: str = "") -> StoredResponse:
    item = {"id": f"item-{id}", "text": text}
    return StoredResponse({"id": id}, [item], [])


def test_the_oldest_responses_are_forgotten(monkeypatch):
    monkeypatch.setattr(response_store, "_MAX_STORED", 2)
    store = ResponseStore()
    for id in "abc":
        store.add(stored(id))
    assert store.find("a") is None
    assert [store.find(id) is not None for id in "bc"] == [True, True]
    assert set(store.items()) == {"item-b", "item-c"}


def test_large_conversations_take_the_place_of_many(monkeypatch):
    monkeypatch.setattr(response_store, "_MAX_BYTES", 1000)
    store = ResponseStore()
    store.add(stored("a", "x" * 400))
    store.add(stored("b", "x" * 400))
    assert store.find("a") is not None
    store.add(stored("c", "x" * 400))
    assert store.find("a") is None
    store.add(stored("d", "x" * 2000))
    assert store.items() == {}
    store.add(stored("e"))
    assert store.find("e") is not None


def test_a_response_is_forgotten_after_its_time(monkeypatch):
    store = ResponseStore()
    store.add(stored("a"))
    later = time.monotonic() + 3601
    monkeypatch.setattr(response_store.time, "monotonic", lambda: later)
    assert store.find("a") is None
    assert store.items() == {}

"""Connections of clients that do not read."""

import asyncio
import socket

import pytest
import uvicorn
from uvicorn.server import ServerState

from mlxarch.server.http import protocol


def test_a_client_that_does_not_read_is_disconnected(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(protocol, "STALLED_SECONDS", 0.2)
    lost = []

    class Watched(protocol.LimitedProtocol):
        def connection_lost(self, exc: Exception | None) -> None:
            lost.append(self)
            super().connection_lost(exc)

    async def write_for_ever(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not lost:
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})

    async def run() -> None:
        config = uvicorn.Config(write_for_ever, lifespan="off", log_config=None, ws="none")
        config.load()
        state = ServerState()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Watched(config, state, {}), "127.0.0.1", 0)
        with socket.create_connection(server.sockets[0].getsockname()) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            while not state.tasks:
                await asyncio.sleep(0.01)
            await asyncio.wait_for(asyncio.gather(*state.tasks), 20)
        server.close()

    asyncio.run(run())
    assert lost

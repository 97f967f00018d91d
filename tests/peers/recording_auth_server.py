"""An auth_http server that records the header lines of each request and answers from a list, a list for each client.

The client is known by the `Client-IP` of its request; what a client's list does not answer, its last answer does.
Requests that belong to no client go to `default`, if that is set, and else to `unclaimed`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from tests.peers.scripted import reset


@dataclass(frozen=True, slots=True)
class Answer:
    """The bytes of an answer, and what becomes of the connection: close, keep, hang (kept, no more reading), reset."""

    data: bytes
    then: str = "close"


@dataclass
class Client:
    """One client: its answers, and the header lines of each of its requests in the order they came."""

    answers: Sequence[Answer]
    requests: list[list[bytes]] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)


class RecordingAuthServer:
    """Listens on a port of 127.0.0.1 and, if a path is given, on that unix socket."""

    def __init__(self, port: int = 0, path: Path | None = None) -> None:
        self.port = port
        self._path = path
        self.clients: dict[str, Client] = {}
        self.default: Client | None = None
        self.unclaimed: list[list[bytes]] = []
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> RecordingAuthServer:
        tcp = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
        self._servers.append(tcp)
        self.port = int(tcp.sockets[0].getsockname()[1])
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._servers.append(await asyncio.start_unix_server(self._connected, self._path))
            self._path.chmod(0o777)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self._servers:
            server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while await self._serve(reader, writer):
                    pass
        except asyncio.CancelledError:
            pass  # the streams of 3.11 log a cancelled handler as an error
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Take a request and answer it; False ends the connection."""
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.split(b"\r\n")[:-2]
        client = self._client(lines)
        if client is None:
            self.unclaimed.append(lines)
            return False
        client.requests.append(lines)
        client.arrived.set()
        answer = client.answers[min(len(client.requests), len(client.answers)) - 1]
        writer.write(answer.data)
        await writer.drain()
        match answer.then:
            case "hang":
                await asyncio.Event().wait()
            case "reset":
                reset(writer)
        return answer.then == "keep"

    def _client(self, lines: list[bytes]) -> Client | None:
        for line in lines:
            name, _, value = line.partition(b":")
            if name.lower() == b"client-ip":
                return self.clients.get(value.strip().decode("latin-1"), self.default)
        return self.default

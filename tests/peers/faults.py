"""A TCP relay with faults, put between a client and a server, in the test's own loop.

    async with Relay(postfix.port, cut=Cut("down", 12, "reset")) as relay:
        ...                                        # talk to relay.port
    relay.flow.clear()                             # a black hole from here on; set() lets everything through again
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from tests.peers.scripted import reset

Way = Literal["up", "down"]
"""`up` is from the client to the server."""


@dataclass(frozen=True, slots=True)
class Cut:
    """After `after` octets in one direction the connection is reset, closed, or goes silent, both ways."""

    way: Way
    after: int
    how: Literal["reset", "close", "stall"]


@dataclass(frozen=True, slots=True)
class Garble:
    """The octet at this place (from 0) of one direction is changed."""

    way: Way
    at: int


class Relay:
    """`delay` in seconds each way, apart from throughput; `rate` in octets a second, 0 for no limit."""

    def __init__(
        self,
        port: int,
        host: str = "127.0.0.1",
        *,
        delay: float = 0.0,
        rate: int = 0,
        cut: Cut | None = None,
        garble: Garble | None = None,
    ) -> None:
        self._to = (host, port)
        self._delay, self._rate, self._cut, self._garble = delay, rate, cut, garble
        self._tasks: set[asyncio.Task[None]] = set()
        self.flow = asyncio.Event()
        self.flow.set()
        self.was_cut = asyncio.Event()

    async def __aenter__(self) -> Relay:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        server_writer: asyncio.StreamWriter | None = None
        try:
            server_reader, server_writer = await asyncio.open_connection(*self._to)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump("up", reader, server_writer, writer))
                both.create_task(self._pump("down", server_reader, writer, server_writer))
        except* (OSError, asyncio.CancelledError):
            pass  # one side is gone, so the other goes as well; 3.11 logs a cancelled handler as an error
        finally:
            writer.close()
            if server_writer is not None:
                server_writer.close()
            self._tasks.discard(task)

    async def _pump(
        self, way: Way, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, other: asyncio.StreamWriter
    ) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)
        reading = asyncio.create_task(self._read(reader, queue))
        loop = asyncio.get_running_loop()
        passed = 0
        try:
            while True:
                due, block = await queue.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                await self.flow.wait()
                if not block:
                    if not writer.is_closing():
                        writer.write_eof()
                    return
                block = self._garbled(way, passed, block)
                if self._cut is not None and self._cut.way == way and passed + len(block) >= self._cut.after:
                    await self._end(self._cut, block[: self._cut.after - passed], writer, other)
                    return
                passed += len(block)
                writer.write(block)
                await writer.drain()
                if self._rate:
                    await asyncio.sleep(len(block) / self._rate)
        finally:
            reading.cancel()

    async def _read(self, reader: asyncio.StreamReader, queue: asyncio.Queue[tuple[float, bytes]]) -> None:
        loop = asyncio.get_running_loop()
        block = b"-"
        while block:
            try:
                block = await reader.read(65536)
            except ConnectionError:
                block = b""
            await queue.put((loop.time() + self._delay, block))

    def _garbled(self, way: Way, passed: int, block: bytes) -> bytes:
        if self._garble is None or self._garble.way != way:
            return block
        place = self._garble.at - passed
        if not 0 <= place < len(block):
            return block
        return block[:place] + bytes([block[place] ^ 0xFF]) + block[place + 1 :]

    async def _end(self, cut: Cut, rest: bytes, writer: asyncio.StreamWriter, other: asyncio.StreamWriter) -> None:
        writer.write(rest)
        await writer.drain()
        self.was_cut.set()
        if cut.how == "stall":
            await asyncio.Event().wait()
        for side in (writer, other):
            if cut.how == "reset":
                reset(side)
            else:
                side.close()

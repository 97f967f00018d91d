"""A plain SMTP client that may also leave in the middle of anything."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

from gateway.testing.gateway import Gateway
from tests.peers.scripted import reset

Way = Literal["close", "half", "reset"]


class Client:
    """A plain client; `say` gives the reply."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        """Send these bytes."""
        self.writer.write(data)

    async def reply(self) -> str:
        """One reply, its last line; empty at the end of the connection."""
        while True:
            line = await self.reader.readline()
            if line[3:4] != b"-":
                return line.decode()

    async def say(self, line: str) -> str:
        """Send a line, read the reply."""
        self.send(line.encode() + b"\r\n")
        return await self.reply()

    async def hello(self) -> None:
        """Greeting and EHLO."""
        assert (await self.reply()).startswith("220")
        assert (await self.say("EHLO client.test")).startswith("250")

    async def envelope(self, *more: str) -> None:
        """From the greeting to an accepted recipient, and `more` lines; every reply must be positive."""
        await self.hello()
        for line in ("MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org>", *more):
            answer = await self.say(line)
            assert answer[0] in "23", (line, answer)

    async def start_tls(self, context: ssl.SSLContext) -> None:
        """The handshake, on what was a connection in clear."""
        await self.writer.start_tls(context)

    async def rest(self) -> bytes:
        """Everything up to the end of the connection, however it ends."""
        seen = b""
        try:
            while block := await self.reader.read(65536):
                seen += block
        except ConnectionError:
            pass
        return seen

    def leave(self, way: Way) -> None:
        """Close; end our direction only; or reset."""
        if way == "reset":
            reset(self.writer)
        elif way == "half":
            self.writer.write_eof()
        else:
            self.writer.close()


@asynccontextmanager
async def connected(gateway: Gateway, *, tls: ssl.SSLContext | None = None, port: int = 0) -> AsyncIterator[Client]:
    """A client; the connection is closed at the end of the body, whatever happened."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port or gateway.port, ssl=tls)
    try:
        yield Client(reader, writer)
    finally:
        if not writer.is_closing() or writer.transport.get_write_buffer_size():
            writer.transport.abort()

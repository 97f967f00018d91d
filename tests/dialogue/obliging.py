"""For tests that walk tables: an upstream that says yes to everything, a client, and a pipeline between them."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from gateway.testing.gateway import Gateway, running
from tests.dialogue.stages import STAGES

LIMIT = 10.0
EHLO = ("PIPELINING", "SIZE 10000000", "8BITMIME", "DSN")


@dataclass
class ObligingUpstream:
    """Says 250 to all but recipients with `nobody` (550) and messages from `spam` (554).

    `commands` are the lines it read, `contents` the raw octets between its 354 and the next CRLF.CRLF, the first
    CRLF included; `cut` the octets of content that never ended so.
    """

    commands: list[bytes] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)
    cut: list[bytes] = field(default_factory=list)
    port: int = 0

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[ObligingUpstream]:
        """Listen on `port`."""
        writers: list[asyncio.StreamWriter] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            try:
                await self._serve(reader, writer)
            except ConnectionError:
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for writer in writers:
                writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 upstream.test ESMTP\r\n")
        sender = b""
        while line := await reader.readline():
            self.commands.append(line)
            verb = line[:4].upper()
            if verb == b"MAIL":
                sender = line
            if verb == b"EHLO":
                writer.write(b"".join(b"250-%b\r\n" % word.encode() for word in EHLO) + b"250 8BITMIME\r\n")
            elif verb == b"RCPT" and b"nobody" in line:
                writer.write(b"550 5.1.1 nobody\r\n")
            elif verb == b"DATA":
                writer.write(b"354 go\r\n")
                if not await self._content(reader):
                    return
                writer.write(b"554 5.7.1 spam\r\n" if b"spam" in sender else b"250 2.0.0 queued\r\n")
            elif verb == b"QUIT":
                writer.write(b"221 2.0.0 Bye\r\n")
                return
            else:
                writer.write(b"250 2.0.0 Ok\r\n")

    async def _content(self, reader: asyncio.StreamReader) -> bool:
        content = b"\r\n"
        while not content.endswith(b"\r\n.\r\n"):
            try:
                content += await reader.readuntil(b"\n")
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                self.cut.append(content + getattr(error, "partial", b""))
                return False
        self.contents.append(content[: -len(b".\r\n")])
        return True


class Client:
    """A client that knows whole replies."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connected(cls, port: int, source: str = "127.0.0.1") -> Client:
        """To the gateway; its greeting is not read yet."""
        return cls(*await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0)))

    async def send(self, data: bytes, *, octet_by_octet: bool = False) -> None:
        """These octets, as they are."""
        for piece in (data[at : at + 1] for at in range(len(data))) if octet_by_octet else (data,):
            self.writer.write(piece)
            await asyncio.sleep(0)
        with contextlib.suppress(ConnectionError):  # the next reply tells
            await self.writer.drain()

    async def reply(self) -> bytes:
        """The last line of the next reply; b"" at the end of the connection."""
        async with asyncio.timeout(LIMIT):
            while True:
                try:
                    line = await self.reader.readline()
                except ConnectionError:
                    return b""
                if line[3:4] != b"-":
                    return line

    async def say(self, line: str) -> str:
        """A command; the code of the reply to it, `closed` if there is none."""
        await self.send(line.encode() + b"\r\n")
        return await self.code()

    async def code(self) -> str:
        """The code of the next reply."""
        return (await self.reply())[:3].decode() or "closed"

    async def start_tls(self) -> None:
        """The handshake."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        async with asyncio.timeout(LIMIT):
            await self.writer.start_tls(context)

    def leave(self) -> None:
        """At once."""
        self.writer.transport.abort()


@asynccontextmanager
async def between(upstream: ObligingUpstream, pipeline: Mapping[str, object]) -> AsyncIterator[Gateway]:
    """A gateway in front of it."""
    whole = {
        "relay": "open",
        "upstreams": {"mta": {"servers": [f"smtp://127.0.0.1:{upstream.port}"], "capabilities": {"assume": [*EHLO]}}},
        "stages": [{"splice": {"handoff": "never"}}],
        **pipeline,
    }
    async with running(whole, stages=STAGES) as gateway:
        yield gateway
        await gateway.idle()

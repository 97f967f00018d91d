"""A mail store for bench runs: `python -m bench.store_server IMAP-PORT POP3-PORT` takes every login and prints ready.

It does as little as it can, its CPU is on nobody's account: one process, answers made beforehand, FETCH always the
same 25 MB.
"""

from __future__ import annotations

import asyncio
import sys
from typing import cast

import uvloop

BIG = 25_000_000
CAPABILITIES = b"IMAP4rev1 SASL-IR LITERAL+ ID IDLE NAMESPACE UIDPLUS AUTH=PLAIN"
CAPA = b"+OK\r\nUSER\r\nSASL PLAIN\r\nTOP\r\nUIDL\r\nPIPELINING\r\n.\r\n"
MESSAGE = b"* 1 FETCH (BODY[] {%d}\r\n" % BIG + (b"x" * 78 + b"\r\n") * (BIG // 80) + b")\r\n"


class Line(asyncio.Protocol):
    """What both protocols share: whole lines of one client."""

    greeting = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        self.begun = b""
        self.transport.write(self.greeting)

    def data_received(self, data: bytes) -> None:
        """Answer every whole line."""
        lines = (self.begun + data).split(b"\r\n")
        self.begun = lines.pop()
        for line in lines:
            self.line(line)

    def line(self, line: bytes) -> None:
        """One line."""


class Imap(Line):
    """Logins with or without literals (which hold no line end here), NOOP, FETCH, LOGOUT."""

    greeting = b"* OK [CAPABILITY " + CAPABILITIES + b"] ready\r\n"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet."""
        self.tag = b""
        super().connection_made(transport)

    def line(self, line: bytes) -> None:
        """One line, or a part of a command."""
        tag, _, rest = line.partition(b" ")
        if self.tag:
            tag, rest = self.tag, b"LOGIN"
            self.tag = b""
        if line.endswith(b"}"):
            self.tag = tag
            if not line.endswith(b"+}"):
                self.transport.write(b"+ go on\r\n")
            return
        verb = rest[:5].upper()
        if verb == b"LOGIN":
            self.transport.write(tag + b" OK [CAPABILITY " + CAPABILITIES + b"] Logged in\r\n")
        elif verb == b"CAPAB":
            self.transport.write(b"* CAPABILITY " + CAPABILITIES + b"\r\n" + tag + b" OK done\r\n")
        elif verb == b"FETCH":
            self.transport.write(MESSAGE)
            self.transport.write(tag + b" OK done\r\n")
        elif verb == b"LOGOU":
            self.transport.write(b"* BYE Logging out\r\n" + tag + b" OK done\r\n")
            self.transport.close()
        else:
            self.transport.write(tag + b" OK done\r\n")


class Pop3(Line):
    """USER, PASS, CAPA, NOOP, QUIT."""

    greeting = b"+OK ready\r\n"

    def line(self, line: bytes) -> None:
        """One command."""
        self.transport.write(CAPA if line == b"CAPA" else b"+OK done\r\n")
        if line == b"QUIT":
            self.transport.close()


async def serve(imap: int, pop3: int) -> None:
    """Until it is ended."""
    loop = asyncio.get_running_loop()
    await loop.create_server(Imap, "127.0.0.1", imap, backlog=512)
    server = await loop.create_server(Pop3, "127.0.0.1", pop3, backlog=512)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2])))

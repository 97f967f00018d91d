"""An SMTP client that can stop anywhere and wait, in the test's own loop."""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

LIMIT = 20.0
STRANGER = "127.0.0.5"
"""A client's address which is not the gateway's own, as any of 127.0.0.0/8 may connect."""

Mode = Literal["plain", "starttls", "tls"]


class MailClient:
    """One connection. Every reply is waited for at most LIMIT seconds."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def reply(self) -> str:
        """The next reply, its lines joined by LF; empty when the server closed."""
        lines: list[str] = []
        async with asyncio.timeout(LIMIT):
            while not lines or lines[-1][3:4] == "-":
                line = await self._reader.readline()
                if not line:
                    break
                lines.append(line.decode("utf-8", "replace").rstrip("\r\n"))
        return "\n".join(lines)

    async def say(self, line: str) -> str:
        """A command and its reply."""
        await self.send(line.encode() + b"\r\n")
        return await self.reply()

    async def send(self, data: bytes) -> None:
        """Bytes as they are."""
        self._writer.write(data)
        await self._writer.drain()

    async def login(self, user: str, password: str) -> str:
        """AUTH PLAIN."""
        return await self.say("AUTH PLAIN " + base64.b64encode(f"\0{user}\0{password}".encode()).decode())

    async def envelope(self, *recipients: str, sender: str = "a@x.test", parameters: str = "") -> str:
        """MAIL, the RCPTs: the reply to the last."""
        reply = await self.say(f"MAIL FROM:<{sender}>{parameters}")
        for recipient in recipients if reply.startswith("2") else ():
            reply = await self.say(f"RCPT TO:<{recipient}>")
        return reply

    async def content(self, message: bytes) -> str:
        """DATA with dots stuffed and the end of data: the last reply."""
        reply = await self.say("DATA")
        if not reply.startswith("354"):
            return reply
        return await self.end(message)

    async def end(self, message: bytes) -> str:
        """The content after a 354."""
        stuffed = b"\r\n".join(b"." + line if line[:1] == b"." else line for line in message.split(b"\r\n"))
        await self.send(stuffed + (b"" if not message or message.endswith(b"\r\n") else b"\r\n") + b".\r\n")
        return await self.reply()

    async def chunks(self, *chunks: bytes) -> str:
        """BDAT, chunk by chunk; the last reply."""
        reply = ""
        for index, chunk in enumerate(chunks, 1):
            last = " LAST" if index == len(chunks) else ""
            await self.send(f"BDAT {len(chunk)}{last}\r\n".encode() + chunk)
            reply = await self.reply()
            assert reply.startswith("250") or last, reply
        return reply

    async def start_tls(self, ca: Path, name: str) -> None:
        """STARTTLS, the handshake, EHLO."""
        reply = await self.say("STARTTLS")
        assert reply.startswith("220"), reply
        async with asyncio.timeout(LIMIT):
            await self._writer.start_tls(ssl.create_default_context(cafile=str(ca)), server_hostname=name)
        await self.say("EHLO client.test")


@asynccontextmanager
async def connected(
    port: int,
    *,
    source: str = STRANGER,
    mode: Mode = "plain",
    ca: Path | None = None,
    name: str = "",
    first: bytes = b"",
    hello: str = "EHLO",
) -> AsyncIterator[MailClient]:
    """A client that has read the greeting and said EHLO (or LHLO); `first` goes out before (a PROXY header).

    The server's certificate is verified with `ca` and for `name`.
    """
    context = ssl.create_default_context(cafile=str(ca)) if mode == "tls" else None
    async with asyncio.timeout(LIMIT):
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, local_addr=(source, 0), ssl=context, server_hostname=name if context else None
        )
    client = MailClient(reader, writer)
    try:
        if first:
            await client.send(first)
        greeting = await client.reply()
        assert greeting.startswith("220"), greeting
        ehlo = await client.say(f"{hello} client.test")
        assert ehlo.startswith("250"), ehlo
        if mode == "starttls":
            assert ca is not None
            await client.start_tls(ca, name)
        yield client
    finally:
        writer.transport.abort()


def without_trace(message: bytes) -> bytes:
    """A message as Postfix stored it, without the fields that it put in front."""
    lines = message.split(b"\n")
    for field in (b"Return-Path:", b"X-Original-To:", b"Delivered-To:", b"Received:"):
        assert lines[0].startswith(field), lines[:8]
        lines.pop(0)
        while lines and lines[0][:1] in (b" ", b"\t") and field == b"Received:":
            lines.pop(0)
    return b"\n".join(lines)


def by_sender(messages: Iterable[bytes]) -> dict[str, bytes]:
    """Stored messages by their Return-Path."""
    return {message.partition(b">")[0].rpartition(b"<")[2].decode(): message for message in messages}

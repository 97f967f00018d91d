"""Content on its way out: what goes in one write, what stops it, and when nothing may be cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from gateway.protocol.content import DotStuffer
from gateway.protocol.smtp import Reply
from gateway.relay.outgoing import CHUNK, Outgoing
from gateway.upstream.dial import dial
from gateway.upstream.pool import PoolSettings
from gateway.upstream.server import Server
from gateway.upstream.smtp import Connection
from gateway.verdicts import Cause, Refuse

pytestmark = pytest.mark.anyio


class Upstream:
    """Takes a message as DATA or in chunks; `replies` are said to the chunks, or to the end, one after the other."""

    def __init__(self, *replies: str) -> None:
        self.replies = list(replies)
        self.chunks: list[bytes] = []
        self.content = b""
        self.heard = asyncio.Event()  # an end
        self.over = asyncio.Event()
        self.go_on = asyncio.Event()
        self.writer: asyncio.StreamWriter

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        writer.write(b"220 u\r\n")
        try:
            await self._converse(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()
            self.over.set()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            verb, *rest = line.split()
            if verb == b"EHLO":
                writer.write(b"250-u\r\n250 CHUNKING\r\n")
            elif verb == b"DATA":
                writer.write(b"354 go\r\n")
                self.content = await reader.readuntil(b"\r\n.\r\n")
                await self._answer(writer)
            elif verb == b"BDAT":
                self.chunks.append(await reader.readexactly(int(rest[0])))
                await self._answer(writer, wait=b"LAST" in rest)

    async def _answer(self, writer: asyncio.StreamWriter, *, wait: bool = True) -> None:
        if wait:
            self.heard.set()
            await self.go_on.wait()
        reply = self.replies.pop(0)
        if not reply:
            raise ConnectionAbortedError
        writer.write(reply.encode() + b"\r\n")


@asynccontextmanager
async def sending(upstream: Upstream, *, bdat: bool) -> AsyncIterator[tuple[Outgoing, list[bool]]]:
    """Something that goes out to it, and what was said of being committed."""
    server = await asyncio.start_server(upstream.connected, "127.0.0.1", 0)
    url = f"smtp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    connection: Connection = await dial(Server(url), PoolSettings(), hostname="g.example")
    if not bdat:
        assert (await connection.command(b"DATA")).code == 354
    committed: list[bool] = []
    try:
        yield Outgoing(connection, data_timeout=10, end_timeout=10, commit=committed.append, bdat=bdat), committed
    finally:
        connection.abort()
        await upstream.over.wait()
        server.close()


CONTENT = b"Subject: x\r\n\r\n" + b".line of some length\r\n" * 40_000


@pytest.mark.parametrize("size", [1000, CHUNK, CHUNK + 1, 1 << 20])
async def test_chunks(size: int) -> None:
    """In chunks of one size, each answered before the next; nothing in them is stuffed."""
    upstream = Upstream(*["250 ok"] * 4, "250 done")
    upstream.go_on.set()
    async with sending(upstream, bdat=True) as (out, committed):
        stuffed = DotStuffer().feed(CONTENT)
        for at in range(0, len(stuffed), size):
            await out.send(stuffed[at : at + size])
        upstream.replies[:] = ["250 done"]
        assert await out.end() == [Reply.of("250 done")]
        assert b"".join(upstream.chunks) == CONTENT
        assert {len(chunk) for chunk in upstream.chunks[:-1]} == {CHUNK} and len(upstream.chunks[-1]) < CHUNK
        assert committed == [True, False] and out.connection.idle


@pytest.mark.parametrize(
    ("said", "refuse"),
    [
        ("552 5.3.4 too big", Refuse(Cause.CONTENT, reply=Reply.of("552 5.3.4 too big"))),
        ("452 4.3.1 full", Refuse(Cause.CONTENT, reply=Reply.of("452 4.3.1 full"))),
        ("421 4.3.2 down", None),
        ("354 go", None),
        ("nonsense", None),
        ("", None),
    ],
)
async def test_a_chunk_that_is_not_taken(said: str, refuse: Refuse | None) -> None:
    """The message has ended: its rest is dropped, it never gets an end, the connection is closed."""
    upstream = Upstream("250 ok", said)
    async with sending(upstream, bdat=True) as (out, committed):
        await out.send(b"x" * 3 * CHUNK)
        assert out.refused is not None and out.abandoned and out.connection.closing
        assert out.refused == refuse if refuse else out.refused.cause is Cause.UPSTREAM_LOST
        await out.send(b"x" * CHUNK)
        assert await out.end() == [out.refused]
        assert len(upstream.chunks) == 2 and committed == [] and not upstream.heard.is_set()


async def test_committed_from_the_end_to_its_answer() -> None:
    """Promise 2: in between nothing may be cancelled."""
    upstream = Upstream("250 queued")
    async with sending(upstream, bdat=False) as (out, committed):
        await out.send(b"a\r\n")
        await out.send(b"..b\r\n")
        assert committed == []
        ending = asyncio.create_task(out.end())
        await upstream.heard.wait()
        assert committed == [True] and not ending.done()
        upstream.go_on.set()
        assert await ending == [Reply.of("250 queued")]
        assert committed == [True, False] and upstream.content == b"a\r\n..b\r\n.\r\n"
        assert out.connection.idle and not out.abandoned


@pytest.mark.parametrize("said", ["", "nonsense", "354 go"])
@pytest.mark.parametrize("bdat", [True, False])
async def test_lost_after_the_end(said: str, bdat: bool) -> None:
    """A refusal for now, whatever became of the message."""
    upstream = Upstream(said)
    upstream.go_on.set()
    async with sending(upstream, bdat=bdat) as (out, committed):
        await out.send(b"a\r\n")
        (answer,) = await out.end()
        assert isinstance(answer, Refuse) and answer.cause is Cause.UPSTREAM_LOST
        assert out.abandoned and committed == [True, False]


async def test_answered_too_early() -> None:
    """What is said during content answers nothing: the two are out of step, and there is no end."""
    upstream = Upstream()
    async with sending(upstream, bdat=False) as (out, committed):
        await out.send(b"a\r\n")
        upstream.writer.write(b"250 already\r\n")
        await out.connection.wire.wait_readable()
        await out.send(b"b\r\n")
        await out.send(b"c\r\n")
        assert out.refused is not None and out.refused.cause is Cause.UPSTREAM_LOST
        assert await out.end() == [out.refused]
        assert committed == [] and out.abandoned


async def test_the_first_refusal_counts() -> None:
    upstream = Upstream()
    async with sending(upstream, bdat=False) as (out, _):
        first = Refuse(Cause.LOOP)
        out.stop(first)
        out.stop(Refuse(Cause.CONTENT))
        assert out.refused is first and out.abandoned

"""An upstream that refuses, hangs, answers garbage, drips, closes in the middle of a reply, or resets: at each step.

The client always gets a clear temporary answer and may go on; nothing is accepted that the upstream did not accept.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable

import pytest

from gateway.testing.gateway import free_port, running
from tests.fault.baseline import unchanged
from tests.fault.client import Client

EHLO = ["PIPELINING", "SIZE 1000000", "8BITMIME"]
STEPS = ["greeting", "EHLO", "MAIL", "RCPT", "DATA", "content", "end"]
FAULTS = ["hang", "garbage", "half a reply", "reset", "close", "421", "endless reply"]
REPLIES = {
    "MAIL": b"250 2.1.0 Ok\r\n",
    "RCPT": b"250 2.1.5 Ok\r\n",
    "DATA": b"354 go\r\n",
    "QUIT": b"221 Bye\r\n",
    "RSET": b"250 Ok\r\n",
}


class Faulty:
    """An upstream that does the wrong thing at one step, on every connection."""

    def __init__(self, step: str, fault: str) -> None:
        self.step, self.fault = step, fault
        self.accepted = 0
        self.writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.writers.append(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await self._talk(reader, writer)
        writer.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not await self._say("greeting", b"220 faulty.test\r\n", writer, reader):
            return
        while line := await reader.readline():
            verb = line[:4].upper().decode()
            answer = (
                b"".join(b"250-" + word.encode() + b"\r\n" for word in EHLO[:-1])
                + b"250 "
                + EHLO[-1].encode()
                + b"\r\n"
            )
            if not await self._say(
                verb, answer if verb == "EHLO" else REPLIES.get(verb, b"500 what\r\n"), writer, reader
            ):
                return
            if verb == "DATA" and not await self._content(reader, writer):
                return

    async def _content(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        first = await reader.readline()
        if not await self._say("content", b"", writer, reader):
            return False
        line = first
        while line and line != b".\r\n":
            line = await reader.readline()
        if not line:
            return False
        if not await self._say("end", b"250 2.0.0 queued\r\n", writer, reader):
            return False
        self.accepted += 1
        return True

    async def _say(self, step: str, reply: bytes, writer: asyncio.StreamWriter, reader: asyncio.StreamReader) -> bool:
        """The right reply, or the fault; False ends the connection."""
        if step != self.step:
            writer.write(reply)
            return True
        match self.fault:
            case "hang":
                await reader.read()
            case "garbage":
                writer.write(b"\x00\xff\xfe!!!\r\n" * 3)
                await reader.read()
            case "half a reply":
                writer.write(b"250-half")
            case "reset":
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
            case "421":
                writer.write(b"421 4.3.2 leaving\r\n")
            case "endless reply":
                with contextlib.suppress(ConnectionError):
                    for _ in range(10_000):
                        writer.write(b"250-and more\r\n" * 100)
                        await writer.drain()
        return False


async def converse(client: Client) -> list[str]:
    """A whole message; the replies. Stops sending where the server would not hear."""
    said = [await client.reply()]
    if not said[-1].startswith("220"):
        return said
    said.append(await client.say("EHLO client.test"))
    for line in ("MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org>", "DATA"):
        said.append(await client.say(line))
    if said[-1].startswith("354"):
        said.append(await client.say("Subject: x\r\n\r\n" + "line\r\n" * 20 + "."))
    said.append(await client.say("NOOP"))
    said.append(await client.say("QUIT"))
    return said


def pipeline(ports: list[int], **more: object) -> dict[str, object]:
    """An envelope pipeline to these ports with short clocks."""
    return {
        "relay": "open",
        "stages": [{"splice": {"handoff": "never"}}],
        "upstreams": {
            "mta": {
                "servers": [f"smtp://127.0.0.1:{port}" for port in ports],
                "connect_timeout": "200ms",
                "greeting_timeout": "200ms",
                "command_timeout": "200ms",
                "data_done_timeout": "200ms",
                "capabilities": {"assume": EHLO},
                **more,
            }
        },
    }


@pytest.mark.anyio
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("step", STEPS)
async def test_a_faulty_upstream_is_a_temporary_refusal(step: str, fault: str) -> None:
    faulty = Faulty(step, fault)
    server = await asyncio.start_server(faulty.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        async with running(pipeline([port])) as gateway, unchanged(gateway):
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            async with asyncio.timeout(20):
                said = await converse(Client(reader, writer))
            writer.close()
            for held in faulty.writers:
                held.close()
        answers = said[2:-2]
        if step == "content" and fault in ("hang", "421"):
            pass  # seen or not before the end: the answer decides either way
        assert any(answer.startswith("4") for answer in answers), said
        assert not any(answer.startswith("250 2.0.0 queued") for answer in answers), said
        assert said[-2].startswith("250 2.0.0"), "the session goes on"
        assert said[-1].startswith("221")
        assert faulty.accepted == 0
    finally:
        server.close()


@pytest.mark.anyio
@pytest.mark.parametrize("step", ["greeting", "EHLO", "MAIL", "RCPT", "DATA"])
@pytest.mark.parametrize("fault", ["close", "reset", "421", "garbage"])
async def test_another_server_of_the_pool_takes_over(step: str, fault: str) -> None:
    faulty, sound = Faulty(step, fault), Faulty("none", "none")
    servers = [await asyncio.start_server(one.serve, "127.0.0.1", 0) for one in (faulty, sound)]
    ports = [server.sockets[0].getsockname()[1] for server in servers]
    try:
        async with running(pipeline(ports)) as gateway, unchanged(gateway):
            for _ in range(2):  # in turn: one of the two begins at the faulty one
                reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
                async with asyncio.timeout(20):
                    said = await converse(Client(reader, writer))
                writer.close()
                assert "250 2.0.0 queued\r\n" in said, said
            for held in (*faulty.writers, *sound.writers):
                held.close()
        assert sound.accepted == 2
    finally:
        for server in servers:
            server.close()


@pytest.mark.anyio
async def test_nobody_listens() -> None:
    async with running(pipeline([free_port()])) as gateway, unchanged(gateway):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        said = await converse(Client(reader, writer))
        writer.close()
    assert said[2].startswith("451 4.4.1 "), said


LEAVES: list[tuple[str, Callable[[Client], object]]] = [
    (line, lambda client: client.writer.transport.abort())
    for line in ("", "EHLO client.test", "MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org>", "DATA", "Subject: x")
]


@pytest.mark.anyio
@pytest.mark.parametrize("last", [line for line, _ in LEAVES])
async def test_a_client_that_resets_at_each_step_leaves_nothing(last: str) -> None:
    sound = Faulty("none", "none")
    server = await asyncio.start_server(sound.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        async with running(pipeline([port])) as gateway, unchanged(gateway):
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            client = Client(reader, writer)
            await client.reply()
            for line, _ in LEAVES[1:]:
                if last == "":
                    break
                writer.write(line.encode() + b"\r\n")
                if line == last:
                    break
                await client.reply()
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            await gateway.idle()
            for held in sound.writers:
                held.close()
        assert sound.accepted == 0
    finally:
        server.close()

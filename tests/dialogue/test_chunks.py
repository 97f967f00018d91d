"""BDAT that cannot be meant, very many chunks, and clients that leave at any octet of a session."""

from __future__ import annotations

import socket
import struct
import tracemalloc

import pytest

from tests.dialogue.obliging import Client, ObligingUpstream, between
from tests.dialogue.smuggling import MAIL, opened

HUGE = ("9223372036854775808", "18446744073709551616", "99999999999999999999999999", "10000000000")
BAD = ("", "-1", "-1 LAST", "+1", "1.5", "0x10", "1e3", "6 FIRST", "LAST", "6LAST", "6 LAST LAST", *HUGE)
BEHIND = b"RSET\r\n" + MAIL + b"BDAT 4 LAST\r\nevil"
CHUNKS = 20_000
GROUP = 250


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """uvloop: the transcripts play on both loops."""
    return "asyncio", {"use_uvloop": True}


@pytest.mark.anyio
@pytest.mark.parametrize("before", ["nothing", "recipient", "chunk", "refused chunk"])
async def test_a_size_that_cannot_be(before: str) -> None:
    """Nobody knows how much follows, so nothing that follows is read: 501 and the end, wherever it comes."""
    group, codes = {
        "nothing": (b"", []),
        "recipient": (MAIL, ["250", "250"]),
        "chunk": (MAIL + b"BDAT 4\r\ntext", ["250", "250", "250"]),
        "refused chunk": (b"BDAT 4\r\ntext", ["503"]),
    }[before]
    async with ObligingUpstream().listening() as upstream, between(upstream, {}) as gateway:
        for size in BAD:
            client = await opened(gateway.port)
            await client.send(group + f"BDAT {size}\r\n".encode() + BEHIND)
            assert [await client.code() for _ in codes] == codes, size
            assert await client.reply() == b"501 5.5.4 Syntax: BDAT size [LAST]\r\n", size
            assert await client.code() == "closed", size
            client.leave()
    assert not upstream.contents


@pytest.mark.anyio
async def test_a_size_that_nobody_sends() -> None:
    """What can be counted is content to its last octet: commands behind it are none, and there is no message."""
    async with ObligingUpstream().listening() as upstream, between(upstream, {}) as gateway:
        for group, codes in ((b"", []), (MAIL, ["250", "250"]), (MAIL + b"BDAT 4\r\ntext", ["250"] * 3)):
            client = await opened(gateway.port)
            await client.send(group + b"BDAT 9999999999 LAST\r\n" + BEHIND)
            client.writer.write_eof()
            assert [await client.code() for _ in codes] == codes
            assert await client.code() == "closed"
            client.leave()
    assert not upstream.contents
    assert sum(line.startswith(b"MAIL") for line in upstream.commands) == 2


@pytest.mark.slow
@pytest.mark.anyio
@pytest.mark.parametrize("refused", [False, True], ids=["good", "no recipient"])
async def test_memory_does_not_grow_with_chunks(refused: bool) -> None:
    """A million one-octet chunks cost time only, where `limits.bdat_chunks` lets them in at all."""
    recipient = b"RCPT TO:<nobody@example.org>\r\n" if refused else b"RCPT TO:<b@example.org>\r\n"
    code = b"554" if refused else b"250"
    async with (
        ObligingUpstream().listening() as upstream,
        between(upstream, {"limits": {"bdat_chunks": CHUNKS + 1}}) as gateway,
    ):
        client = await opened(gateway.port)
        await client.send(b"MAIL FROM:<a@example.org>\r\n" + recipient)
        assert [await client.code() for _ in range(2)] == ["250", "550" if refused else "250"]
        # A line end now and then, for the upstream reads lines.
        group = b"BDAT 1\r\nx" * (GROUP - 2) + b"BDAT 1\r\n\rBDAT 1\r\n\n"
        await say_group(client, group, code)
        tracemalloc.start()
        try:
            for _ in range(CHUNKS // GROUP - 1):
                await say_group(client, group, code)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 20 * CHUNKS  # octets, this client and its upstream included
        assert await client.say("BDAT 0 LAST") == code.decode()
        client.leave()
    assert [len(content) - 2 for content in upstream.contents] == ([] if refused else [CHUNKS])


async def say_group(client: Client, group: bytes, code: bytes) -> None:
    """Chunks in one write; all have this reply."""
    await client.send(group)
    for _ in range(GROUP):
        reply = await client.reply()
        assert reply[:3] == code, reply


# -- leaving


# What is sent and answered first, group by group, and what is cut at every octet.
SESSIONS = {
    "commands": (b"", b"EHLO client.test\r\n"),
    "envelope": (b"EHLO client.test\r\n", MAIL + b"DATA\r\n"),
    "DATA": (b"EHLO client.test\r\n|" + MAIL + b"DATA\r\n", b"Subject: x\r\n\r\n..one\r\n.\r\n"),
    "BDAT": (
        b"EHLO client.test\r\n",
        MAIL + b"BDAT 5\r\none\r\nBDAT 0\r\nBDAT 8\r\ntwo\r\n.\r\nBDAT 3 LAST\r\n.\r\n",
    ),
}
LEAVES = ("closes", "resets", "shuts down")


@pytest.mark.anyio
@pytest.mark.parametrize("leaves", LEAVES)
@pytest.mark.parametrize("name", SESSIONS)
async def test_leaving_at_any_octet(name: str, leaves: str) -> None:
    """No message before the last octet of its end, and no session stays."""
    before, wire = SESSIONS[name]
    async with ObligingUpstream().listening() as upstream, between(upstream, {}) as gateway:
        for length in range(len(wire)):
            client = await Client.connected(gateway.port)
            assert await client.code() == "220"
            for group in before.split(b"|"):
                await client.send(group)
                for _ in range(group.count(b"\r\n")):
                    assert await client.code() in ("250", "354")
            await client.send(wire[:length])
            await leave(client, leaves)
        await gateway.idle()
        assert not upstream.contents


async def leave(client: Client, how: str) -> None:
    """In this way; who only shuts down its sending side hears everything to the end, and nothing bad."""
    if how == "resets":
        linger = struct.pack("ii", 1, 0)
        client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        client.leave()
    elif how == "closes":
        client.writer.close()
    else:
        client.writer.write_eof()
        while reply := await client.reply():
            assert reply[:1] in (b"2", b"3"), reply
        client.leave()

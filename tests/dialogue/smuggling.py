"""What the tests of smuggling share: the sequences, what is to become of them, and a client that sends many of them."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
from collections.abc import Sequence

from tests.dialogue.obliging import Client

END = b"\r\n.\r\n"
ALL = [bytes(octets) for length in range(1, 5) for octets in itertools.product(b"\r\n.\0", repeat=length)]
LONGER = [bytes(random.Random(seed).choices(b"\r\n.\0", k=5 + seed % 3)) for seed in range(60)]
CLASSIC = [
    b"\r\n.\r\r\n",
    b"\n\r.\n\r",
    b"\r\n\n.\r\n",
    b"\r\r\n.\r",
    b"\r\n\0.\r\n",
    b"\r\n.\0\r\n",
    b"\n\n.\n\n",
    b"\r\n.\n.\n",
]
ENDING = [before + END + behind for before in (b"", b"\r", b"\n", b"\0") for behind in (b"", b"\0", b".")]
SEQUENCES = [*ALL, *(sequence for sequence in LONGER if END not in sequence), *CLASSIC]
FEW = [*ALL[: 4 + 16], *CLASSIC, b"\n.\r\n", b"\r\n.\n", b"\r.\r\n"]
EVIL = b"MAIL FROM:<evil@example.org>\r\nRCPT TO:<x@example.org>\r\nDATA\r\nforged"
MAIL = b"MAIL FROM:<a@example.org>\r\nRCPT TO:<b@example.org>\r\n"
BARE = re.compile(rb"\r(?!\n)|(?<!\r)\n")


def normalized(content: bytes) -> bytes:
    """Without its dots: a lone CR is a blank, a lone LF is CRLF."""
    return re.sub(rb"(?<!\r)\n", b"\r\n", re.sub(rb"\r(?!\n)", b" ", content))


def unstuffed(content: bytes) -> bytes:
    """Wire form, a CRLF in front, to content."""
    return content.replace(b"\r\n.", b"\r\n")[2:]


async def opened(port: int) -> Client:
    """A session up to EHLO."""
    client = await Client.connected(port)
    assert await client.code() == "220"
    assert await client.say("EHLO client.test") == "250"
    return client


async def send_data(client: Client, wires: Sequence[Sequence[bytes]]) -> list[bytes]:
    """Messages by DATA, each in these pieces, and the next one's commands behind it; the answers to the dots."""
    answers: list[bytes] = []
    behind = MAIL + b"DATA\r\n"
    await client.send(behind)
    for *pieces, last in wires:
        assert [await client.code() for _ in range(3)] == ["250", "250", "354"], answers
        for piece in pieces:
            await client.send(piece)
            for _ in range(4):  # turns of the loop in which the gateway takes it
                await asyncio.sleep(0)
        await client.send(last + behind)
        answers.append(await client.reply())
    assert [await client.code() for _ in range(3)] == ["250", "250", "354"], answers
    return answers


async def send_chunks(client: Client, contents: Sequence[bytes]) -> list[bytes]:
    """Messages by BDAT, three chunks each with the sequence between them, in one write; the answers to the last."""
    answers: list[bytes] = []
    for content in contents:
        cuts = (0, 4, 6, len(content))
        chunks = [content[start:stop] for start, stop in itertools.pairwise(cuts)]
        commands = [b"BDAT %d\r\n%b" % (len(chunk), chunk) for chunk in chunks[:-1]]
        await client.send(MAIL + b"".join(commands) + b"BDAT %d LAST\r\n%b" % (len(chunks[-1]), chunks[-1]))
        assert [await client.code() for _ in range(4)] == ["250"] * 4, answers
        answers.append(await client.reply())
    return answers


async def alone(port: int, wire: bytes) -> list[bytes]:
    """One session with these octets behind the 354, and QUIT: the replies that tell of a queued message."""
    client = await opened(port)
    await client.send(MAIL + b"DATA\r\n")
    assert [await client.code() for _ in range(3)] == ["250", "250", "354"]
    await client.send(wire + b"QUIT\r\n")
    queued = []
    while reply := await client.reply():
        if b"queued" in reply:
            queued.append(reply)
    client.leave()
    return queued

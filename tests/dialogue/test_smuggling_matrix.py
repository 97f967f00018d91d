"""Smuggling through a real listener: all sequences up to four octets and a sample of longer ones, many a session.

Three upstreams that disagree on what ends a line, all values of `line_endings`, clients that are trusted and not,
DATA and BDAT. The upstream's messages are exactly those whose 250 the client got: in number, in order, and octet by
octet what the policy makes of them. In the opaque grade the upstream is the only judge and nothing is looked at:
there all octets arrive as they were sent, and the client gets all its answers.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import cast

import pytest

from gateway.testing.gateway import running
from tests.dialogue.smuggling import (
    BARE,
    END,
    ENDING,
    EVIL,
    FEW,
    SEQUENCES,
    alone,
    normalized,
    opened,
    send_chunks,
    send_data,
    unstuffed,
)
from tests.dialogue.stages import STAGES

pytestmark = pytest.mark.slow  # `make test` runs it, `make test-fast` does not

GRADES: dict[str, list[object]] = {
    "envelope": [{"splice": {"handoff": "never"}}],
    "content": [{"reads": {"read": "body"}}, "splice"],
    "content, spooled": [{"reads": {"read": "whole", "edits": "any"}}, "splice"],
}
OPAQUE: list[object] = [{"splice": {"handoff": "auto"}}]

# How each upstream ends a command and DATA.
UPSTREAMS = {
    "strict": (re.compile(rb"\r\n"), re.compile(rb"\r\n\.\r\n")),
    "postfix": (re.compile(rb"\r*\n"), re.compile(rb"\r*\n\.\r*\n")),
    "aiosmtpd": (re.compile(rb"\r*\n"), re.compile(rb"\r\n\.\r\n")),
    "anything": (re.compile(rb"\r\n|\r|\n"), re.compile(rb"(?:\r\n|\r|\n)\.(?:\r\n|\r|\n)")),
}
OWN = {"trust": {"clients": ["127.0.0.0/8"]}}
LINE_ENDINGS: dict[str, tuple[dict[str, object], bool]] = {  # and whether illegal line ends are mended
    "by_trust, stranger": ({}, False),
    "by_trust, own network": (dict(OWN), True),
    "reject, stranger": ({"line_endings": "reject"}, False),
    "reject, own network": ({"line_endings": "reject", **OWN}, False),
    "normalize, stranger": ({"line_endings": "normalize"}, True),
    "normalize, own network": ({"line_endings": "normalise", **OWN}, True),
}


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """uvloop is enough: what is tested is what is done with octets."""
    return "asyncio", {"use_uvloop": True}


class Upstream:
    """Takes every message. `contents` are those it answered with 250, the CRLF before the first line included."""

    def __init__(self, behavior: str) -> None:
        self.line, self.end = UPSTREAMS[behavior]
        self.contents: list[bytes] = []
        self.received: list[bytes] = []  # by connection

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        """Listen; the port."""
        server = await asyncio.get_running_loop().create_server(lambda: Connection(self), "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()


class Connection(asyncio.Protocol):
    """One connection to it."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.buffer = b""
        self.content = False
        self.number = len(upstream.received)
        upstream.received.append(b"")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(b"220 upstream.test ESMTP\r\n")

    def data_received(self, data: bytes) -> None:
        upstream = self.upstream
        upstream.received[self.number] += data
        self.buffer += data
        while match := (upstream.end if self.content else upstream.line).search(self.buffer):
            taken, self.buffer = self.buffer[: match.start()], self.buffer[match.end() :]
            if self.content:
                self.content = False
                upstream.contents.append(taken + b"\r\n")
                self.transport.write(b"250 2.0.0 queued\r\n")
            else:
                self._command(taken[:4].upper())

    def _command(self, verb: bytes) -> None:
        replies = {
            b"EHLO": b"250-upstream.test\r\n250-PIPELINING\r\n250 8BITMIME\r\n",
            b"DATA": b"354 go\r\n",
            b"QUIT": b"221 2.0.0 Bye\r\n",
        }
        self.transport.write(
            b"250 2.0.0 Ok\r\n" if verb in (b"MAIL", b"RCPT", b"RSET") else replies.get(verb, b"500 5.5.2 what\r\n")
        )
        if verb == b"DATA":
            self.content = True
            self.buffer = b"\r\n" + self.buffer
        elif verb == b"QUIT":
            self.transport.close()


def expected(contents: Sequence[bytes], mended: bool, grade: str) -> list[bytes]:
    """What of these messages the upstream is to get.

    None begins with a header field: where stages read them, an empty line says so to everybody.
    """
    normal = [normalized(content) for content in contents if mended or not BARE.search(content)]
    if grade == "envelope":
        return normal
    return [content if content[:2] in (b"", b"\r\n") else b"\r\n" + content for content in normal]


@asynccontextmanager
async def served(behavior: str, stages: list[object], more: dict[str, object]) -> AsyncIterator[tuple[Upstream, int]]:
    """An upstream and the port of a gateway in front of it; at the end all sessions are over."""
    upstream = Upstream(behavior)
    async with upstream.listening() as port:
        pool = {"servers": [f"smtp://127.0.0.1:{port}"], "capabilities": {"assume": ["PIPELINING", "8BITMIME"]}}
        whole = {"relay": "open", "upstreams": {"mta": pool}, "stages": stages, **more}
        async with running(whole, stages=STAGES) as gateway:
            yield upstream, gateway.port
            await gateway.idle()


def codes(answers: Sequence[bytes]) -> list[str]:
    """Their codes."""
    return [answer[:3].decode() for answer in answers]


matrix = pytest.mark.parametrize(
    ("grade", "behavior", "line_endings"), list(itertools.product(GRADES, UPSTREAMS, LINE_ENDINGS))
)


@pytest.mark.anyio
@matrix
async def test_data(grade: str, behavior: str, line_endings: str) -> None:
    more, mended = LINE_ENDINGS[line_endings]
    wires = [before + sequence + EVIL + b"\r\n" for sequence in SEQUENCES for before in (b"one", b"")]
    wires = [wire for wire in wires if END not in b"\r\n" + wire]
    contents = [unstuffed(b"\r\n" + wire) for wire in wires]
    async with served(behavior, GRADES[grade], more) as (upstream, port):
        client = await opened(port)
        answers = await send_data(client, [[wire + b".\r\n"] for wire in wires])
        client.leave()
    assert codes(answers) == ["250" if mended or not BARE.search(wire) else "550" for wire in wires]
    assert [unstuffed(content) for content in upstream.contents] == expected(contents, mended, grade)


@pytest.mark.anyio
@matrix
async def test_bdat(grade: str, behavior: str, line_endings: str) -> None:
    """In chunks a dot has no meaning: every sequence is content."""
    more, mended = LINE_ENDINGS[line_endings]
    contents = [b"one" + sequence + EVIL + b"\r\n" for sequence in [*FEW, *ENDING]]
    async with served(behavior, GRADES[grade], more) as (upstream, port):
        client = await opened(port)
        answers = await send_chunks(client, contents)
        client.leave()
    assert codes(answers) == ["250" if mended or not BARE.search(content) else "550" for content in contents]
    assert [unstuffed(content) for content in upstream.contents] == expected(contents, mended, grade)


@pytest.mark.anyio
@pytest.mark.parametrize("line_endings", ["reject, stranger", "normalize, stranger"])
@pytest.mark.parametrize("behavior", UPSTREAMS)
@pytest.mark.parametrize("grade", GRADES)
async def test_cut(grade: str, behavior: str, line_endings: str) -> None:
    """Cut in two at every place, and octet by octet."""
    more, mended = LINE_ENDINGS[line_endings]
    wires = [b"one" + sequence + b"M\r\n.\r\n" for sequence in FEW]
    divided: list[tuple[bytes, ...]] = [(wire[:place], wire[place:]) for wire in wires for place in range(3, len(wire))]
    divided += [tuple(wire[place : place + 1] for place in range(len(wire))) for wire in wires]
    async with served(behavior, GRADES[grade], more) as (upstream, port):
        client = await opened(port)
        answers = await send_data(client, divided)
        client.leave()
    contents = [b"".join(pieces)[:-3] for pieces in divided]
    assert codes(answers) == ["250" if mended or not BARE.search(content) else "550" for content in contents]
    contents = [unstuffed(b"\r\n" + content) for content in contents]
    assert [unstuffed(content) for content in upstream.contents] == expected(contents, mended, grade)


@pytest.mark.anyio
@matrix
async def test_behind_the_true_end(grade: str, behavior: str, line_endings: str) -> None:
    """What is in a sequence with a CRLF.CRLF ends there; what follows are the client's own commands."""
    more, mended = LINE_ENDINGS[line_endings]
    ends = [b"one" + sequence + EVIL + END for sequence in ENDING] + [b".\r\n" + EVIL + END]
    async with served(behavior, GRADES[grade], more) as (upstream, port):
        queued = [len(await alone(port, wire)) for wire in ends]
    contents = [unstuffed(b"\r\n" + (b"\r\n" + wire).partition(END)[0][2:] + b"\r\n") for wire in ends[:-1]]
    assert sum(queued) == len(upstream.contents)
    assert [unstuffed(content) for content in upstream.contents] == [*expected(contents, mended, grade), b""]


@pytest.mark.anyio
@pytest.mark.parametrize("behavior", UPSTREAMS)
async def test_opaque(behavior: str) -> None:
    """After the hand-off nothing is looked at: the client gets an answer for each message that its upstream saw."""
    wires = [b"one" + sequence + EVIL + END for sequence in [*FEW, *ENDING]]
    async with served(behavior, OPAQUE, {}) as (upstream, port):
        queued = [len(await alone(port, wire)) for wire in wires]
    assert sum(queued) == len(upstream.contents) >= len(wires)
    assert [received.partition(b"DATA\r\n")[2] for received in upstream.received] == [
        wire + b"QUIT\r\n" for wire in wires
    ]

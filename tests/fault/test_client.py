"""Clients that send garbage, never read, never end a line, dribble, or leave: at every point of a session.

Nobody else notices, the upstream gets nothing it should not, and everything is back where it was afterwards.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import random
import socket
import ssl
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from contextvars import Context
from dataclasses import dataclass

import pytest

from gateway import Attempt, Authenticated, Kind, Session, Stage
from gateway.observe import recent
from gateway.testing.gateway import Gateway, free_port, running
from tests.fault.baseline import unchanged
from tests.fault.client import Client, Way, connected
from tests.fault.upstream import Upstream
from tests.interop.conftest import Records

pytestmark = pytest.mark.anyio

HELLO = bytes.fromhex("16030100c8010000c40303") + bytes(60)  # the beginning of a TLS handshake
LOGIN = "AUTH PLAIN " + base64.b64encode(b"\0user\0secret").decode()
BLOCK = b"x" * 65536
ENVELOPE: list[object] = ["verify", {"splice": {"handoff": "never"}}]
HIGH = 1 << 20
"""More than this is never kept of a client: two blocks of the loop and the replies to them."""


class Verify(Stage):
    """Lets everybody in, when the test says so."""

    kind = Kind.GUARD
    decides_identity = True
    never_pass = True
    required = False
    asked, answer = asyncio.Event(), asyncio.Event()

    def mechanisms(self, session: Session) -> Sequence[str]:
        return ("PLAIN", "LOGIN")

    async def auth(self, session: Session, attempt: Attempt) -> Authenticated:
        Verify.asked.set()
        await Verify.answer.wait()
        return Authenticated("user")


@asynccontextmanager
async def serving(
    upstream: Upstream,
    tls: dict[str, object] | None = None,
    stages: Sequence[object] = ENVELOPE,
    limits: dict[str, object] | None = None,
    **more: object,
) -> AsyncIterator[Gateway]:
    """A gateway in front of this upstream; with `tls` its second listener is smtps."""
    pipeline: dict[str, object] = {
        "relay": "open",
        "allow_plaintext_auth": True,
        "stages": list(stages),
        "upstreams": upstream.pool(),
        **more,
        "limits": {"linger": "100ms", **(limits or {})},
    }
    if tls is not None:
        ports: set[int] = set()
        while len(ports) < 2:
            ports.add(free_port())
        first, second = ports
        pipeline |= {"tls": tls, "listen": [f"smtp://127.0.0.1:{first}", f"smtps://127.0.0.1:{second}"]}
    async with running(pipeline, stages={"verify": Verify}) as gateway:
        yield gateway


@asynccontextmanager
async def meeting(
    upstream: Upstream,
    tls: dict[str, object] | None = None,
    *,
    listener: int = 0,
    limits: dict[str, object] | None = None,
) -> AsyncIterator[tuple[Gateway, Client]]:
    """A gateway and one client of it; when they part everything must be as it was."""
    async with (
        asyncio.timeout(20),
        serving(upstream, tls, limits=limits) as gateway,
        unchanged(gateway),
        connected(gateway, port=gateway.ports[listener]) as client,
    ):
        yield gateway, client


# -- leaving, at every point ----------------------------------------------------------------------------------

Reach = Callable[[Client, Upstream], Awaitable[object]]


@dataclass(frozen=True)
class Point:
    """How to come to a point of a session: `wait` is the step at which the upstream keeps silent.

    `half` is false where there is no half-close.
    """

    reach: Reach
    wait: str = ""
    stages: Sequence[object] = tuple(ENVELOPE)
    listener: int = 0
    encrypted: bool = False
    half: bool = True


def sent(*lines: str, last: bytes = b"") -> Reach:
    """EHLO, then each line after the reply to the one before it, then these bytes."""

    async def reach(client: Client, upstream: Upstream) -> None:
        await client.hello()
        for line in lines:
            assert (await client.say(line))[0] in "23", line
        client.send(last)
        await client.writer.drain()

    return reach


def asked(*lines: str, last: bytes) -> Reach:
    """The same until the upstream keeps silent."""

    async def reach(client: Client, upstream: Upstream) -> None:
        await sent(*lines, last=last)(client, upstream)
        await upstream.reached.wait()

    return reach


async def nothing(client: Client, upstream: Upstream) -> None:
    """Connected."""


async def verifying(client: Client, upstream: Upstream) -> None:
    """A verifier works on a login."""
    Verify.asked, Verify.answer = asyncio.Event(), upstream.released
    await sent(last=LOGIN.encode() + b"\r\n")(client, upstream)
    await Verify.asked.wait()


async def choked(client: Client, upstream: Upstream) -> None:
    """The upstream takes no content, and all buffers are full."""
    await sent(*MAIL, "DATA")(client, upstream)
    await upstream.reached.wait()
    for _ in range(128):
        client.send((b"y" * 998 + b"\r\n") * 64)


async def in_clear(client: Client, upstream: Upstream) -> None:
    client.send(HELLO)
    await client.writer.drain()


MAIL = ("MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org>")
OPAQUE: list[object] = ["splice"]
POINTS = {
    "connected": Point(nothing),
    "during a hold": Point(nothing, stages=({"greeting_delay": "60s"}, *ENVELOPE)),
    "inside a command": Point(sent(last=b"MAI")),
    "after EHLO": Point(sent()),
    "inside AUTH": Point(sent("AUTH LOGIN")),
    "inside a response": Point(sent("AUTH LOGIN", last=b"dXN")),
    "while a verifier works": Point(verifying),
    "logged in nowhere": Point(sent("AUTH LOGIN", "dXNlcg==", last=b"*\r\n")),
    "before the handshake": Point(sent("STARTTLS")),
    "inside the handshake": Point(sent("STARTTLS", last=HELLO)),
    "before an implicit handshake": Point(nothing, listener=1),
    "inside an implicit handshake": Point(in_clear, listener=1),
    "under TLS": Point(sent(*MAIL, last=b"DAT"), listener=1, encrypted=True, half=False),
    "after MAIL": Point(sent(*MAIL[:1])),
    "while the upstream is opened": Point(asked(last=b"MAIL FROM:<a@example.org>\r\n"), "EHLO"),
    "while MAIL is asked": Point(asked(last=b"MAIL FROM:<a@example.org>\r\n"), "MAIL"),
    "while RCPT is asked": Point(
        asked(MAIL[0], last=b"RCPT TO:<b@example.org>\r\nRCPT TO:<c@example.org>\r\n"), "RCPT"
    ),
    "after RCPT": Point(sent(*MAIL)),
    "while DATA is asked": Point(asked(*MAIL, last=b"DATA\r\n"), "DATA"),
    "after 354": Point(sent(*MAIL, "DATA")),
    "inside content": Point(sent(*MAIL, "DATA", last=b"Subject: x\r\n\r\nhalf a li")),
    "before the dot's end": Point(sent(*MAIL, "DATA", last=b"Subject: x\r\n\r\n.\r")),
    "while content is stuck": Point(choked, "content"),
    "inside a chunk": Point(sent(*MAIL, last=b"BDAT 100\r\nSubject: x\r\n")),
    "between chunks": Point(sent(*MAIL, "BDAT 0")),
    "after a chunk": Point(sent(*MAIL, last=b"BDAT 4\r\nA: b")),
    "inside a refused chunk": Point(sent(last=b"BDAT 100\r\nSubject: x\r\n")),
    "after the hand-off": Point(sent(*MAIL[:1]), stages=OPAQUE),
    "inside handed-off content": Point(sent(*MAIL, "DATA", last=b"Subject: x\r\n\r\nhalf a li"), stages=OPAQUE),
}


async def visit(point: Point, way: Way, gateway: Gateway, upstream: Upstream, context: ssl.SSLContext) -> None:
    """Come to the point, leave, and wait until the session is over. A reset ends it whatever it waits for."""
    upstream.arm()
    tls = context if point.encrypted else None
    async with asyncio.timeout(10), connected(gateway, tls=tls, port=gateway.ports[point.listener]) as client:
        await point.reach(client, upstream)
        client.leave(way)
        if way == "reset":
            await started(gateway)
            await gateway.idle()
        upstream.release()
        if way == "half":
            await client.rest()
        await gateway.idle()


async def started(gateway: Gateway) -> None:
    """A connection that was opened a moment ago has been accepted."""
    for _ in range(20):
        await asyncio.sleep(0)


WAYS: tuple[Way, ...] = ("close", "half", "reset")
CASES = [(name, way) for name, point in POINTS.items() for way in WAYS if point.half or way != "half"]


@pytest.mark.parametrize(("name", "way"), CASES)
async def test_a_client_that_leaves_leaves_nothing_behind(
    name: str, way: Way, tls: dict[str, object], client_tls: ssl.SSLContext, records: Records
) -> None:
    point = POINTS[name]
    async with Upstream(point.wait) as upstream, serving(upstream, tls, point.stages) as gateway:
        async with unchanged(gateway):
            await visit(point, way, gateway, upstream, client_tls)
        assert upstream.messages == []
    assert records.all("internal_error") == []
    assert len(records.all("session")) == 1


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["uvloop"])
@pytest.mark.parametrize("name", POINTS)
async def test_clients_that_leave_leave_no_memory_behind(
    name: str, tls: dict[str, object], client_tls: ssl.SSLContext, records: Records
) -> None:
    point = POINTS[name]
    ways = [way for way in WAYS if point.half or way != "half"]
    async with Upstream(point.wait) as upstream, serving(upstream, tls, point.stages) as gateway:

        async def objects(visits: int) -> int:
            async with unchanged(gateway):
                for number in range(visits):
                    await visit(point, ways[number % len(ways)], gateway, upstream, client_tls)
            upstream.commands.clear()
            recent.records.clear()  # the last 2,000 are kept
            gc.collect()
            # asyncio keeps some cancelled timers, with their contexts, until there are a hundred of them
            return sum(not isinstance(one, (asyncio.TimerHandle, Context)) for one in gc.get_objects())

        before = await objects(6)
        assert await objects(50) - before < 50


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("end", ["DATA", "BDAT"])
async def test_a_message_is_completed_for_a_client_that_left_after_its_end(
    end: str, way: Way, records: Records
) -> None:
    """Promise 2."""
    content = b"Subject: x\r\n\r\nhello\r\n"
    async with Upstream("end") as upstream, meeting(upstream) as (gateway, client):
        await client.envelope(*(["DATA"] if end == "DATA" else []))
        client.send(content + b".\r\n" if end == "DATA" else b"BDAT %d LAST\r\n" % len(content) + content)
        await upstream.reached.wait()
        client.leave(way)
        await started(gateway)
        assert gateway.pipeline.tasks, "nothing is cancelled now"
        upstream.release()
        await gateway.idle()
    assert upstream.messages == [content]
    assert records.one("transaction")["reply"] == "250 2.0.0 queued"
    assert records.one("session")["transactions"] == 1


# -- garbage --------------------------------------------------------------------------------------------------

CHANCE = random.Random(2587)
GARBAGE = {
    "random": CHANCE.randbytes(3000),
    "random lines": b"\r\n".join(CHANCE.randbytes(60).replace(b"\n", b"") for _ in range(40)) + b"\r\n",
    "NULs": bytes(3000),
    "lines of NULs": b"\0\0\0\r\n" * 30,
    "NUL in a command": b"MAIL FROM:<a\0@example.org>\r\n" * 30,
    "8-bit": b"\xff\xfe\x80\r\n" * 30,
    "8-bit in a command": b"RCPT TO:<\xe9\xe9@example.org>\r\n" * 30,
    "empty lines": b"\r\n" * 30,
    "bare CR": b"NOOP\rNOOP\r" * 30 + b"\r\n" * 20,
    "bare LF": b"NOOP\n" * 30,
    "TLS": HELLO,
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
}
STATES = {
    "before EHLO": ((), 0),
    "after EHLO": (("EHLO client.test",), 0),
    "inside AUTH": (("EHLO client.test", "AUTH LOGIN"), 0),
    "after MAIL": (("EHLO client.test", MAIL[0]), 0),
    "in the handshake": (("EHLO client.test", "STARTTLS"), 0),
    "in an implicit handshake": (None, 1),
}


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("state", STATES)
async def test_garbage_is_an_error_and_nothing_else(
    state: str, garbage: str, tls: dict[str, object], records: Records
) -> None:
    lines, listener = STATES[state]
    async with Upstream() as upstream, meeting(upstream, tls, listener=listener) as (gateway, client):
        for line in ("", *lines) if lines is not None else ():
            assert (await client.say(line) if line else await client.reply())[0] in "23"
        client.send(GARBAGE[garbage])
        client.leave("half")
        answer = await client.rest()
        await gateway.idle()
    if "handshake" not in state:
        assert all(line[:1] in b"45" for line in answer.splitlines()), answer
    assert not any(command.startswith((b"RCPT", b"DATA")) for command in upstream.commands)
    assert records.all("internal_error") == []


@pytest.mark.parametrize("garbage", GARBAGE)
async def test_garbage_as_content_is_content_or_refused_at_its_end(garbage: str, records: Records) -> None:
    """Promise 5: none of it is read as a command; what a stranger may not send never gets its end."""
    async with Upstream() as upstream, meeting(upstream) as (gateway, client):
        await client.envelope("DATA")
        client.send(GARBAGE[garbage] + b"\r\n.\r\n")
        answer = await client.reply()
        assert await client.say("QUIT") == "221 2.0.0 Bye\r\n"
        await gateway.idle()
    clean = all(b"\n" not in part and b"\r" not in part for part in GARBAGE[garbage].split(b"\r\n"))
    assert answer.startswith("250 2.0.0 queued" if clean else "550 5.5.2"), answer
    assert len(upstream.messages) == clean


# -- too much -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def bounded(limit: int) -> AsyncIterator[None]:
    """The body never holds `limit` octets more than before."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    try:
        yield
        grown = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert grown < limit, f"{grown} octets at once"


async def flood(client: Client, gateway: Gateway, block: bytes, count: int) -> int:
    """Send a block many times; the most that the gateway had of it at a time."""
    most = 0
    for _ in range(count):
        client.send(block)
        await client.writer.drain()
        most = max([most, *(one.wire.buffered for one in gateway.pipeline.conversations)])
    return most


@pytest.mark.parametrize("lines", [(), ("EHLO client.test",), ("EHLO client.test", "AUTH LOGIN")])
async def test_a_line_that_never_ends_is_not_kept(lines: tuple[str, ...]) -> None:
    async with Upstream() as upstream, meeting(upstream) as (gateway, client), bounded(4 * HIGH):
        await client.reply()
        for line in lines:
            await client.say(line)
        assert await flood(client, gateway, BLOCK, 256) < HIGH
        client.send(b"\r\n")
        assert (await client.reply()).startswith("500 5.5.")
        assert await client.say("QUIT") == "221 2.0.0 Bye\r\n"


async def test_a_header_that_never_ends_is_refused_at_its_end() -> None:
    async with (
        Upstream(keep=False) as upstream,
        meeting(upstream, limits={"message_size": "5MiB"}) as (gateway, client),
        bounded(6 * HIGH),
    ):
        await client.envelope("DATA")
        assert await flood(client, gateway, b"X-Header: " + b"x" * 988 + b"\r\n", 16_000) < HIGH
        client.send(b".\r\n")
        assert (await client.reply()).startswith("552 5.3.4")
        assert await client.say("QUIT") == "221 2.0.0 Bye\r\n"
    assert upstream.messages == []


async def test_many_commands_in_one_write_are_all_answered() -> None:
    async with Upstream() as upstream, meeting(upstream, limits={"junk_commands": 1000}) as (_, client):
        await client.hello()
        client.send(b"NOOP\r\n" * 1001 + b"QUIT\r\n")
        answers = (await client.rest()).splitlines()
    assert answers[:1000] == [b"250 2.0.0 Ok"] * 1000
    assert answers[1000].startswith(b"421 4.7.0") and len(answers) == 1001


async def test_many_tiny_chunks_end_the_session() -> None:
    async with Upstream() as upstream, meeting(upstream, limits={"bdat_chunks": 2000}) as (gateway, client):
        await client.envelope()
        client.send(b"BDAT 1\r\nx" * 3000)
        answers = (await client.rest()).splitlines()
        await gateway.idle()
    assert answers[:2000] == [b"250 2.0.0 1 octets received"] * 2000
    assert answers[2000].startswith(b"421 4.7.0") and len(answers) == 2001
    assert upstream.messages == []


async def test_refused_recipients_without_end_end_the_session() -> None:
    limits: dict[str, object] = {"recipients": 100}
    async with Upstream() as upstream, meeting(upstream, limits=limits) as (gateway, client):
        await client.hello()
        await client.say(MAIL[0])
        client.send(b"RCPT TO:<b@example.org>\r\n" * 1000)
        answers = (await client.rest()).splitlines()
        await gateway.idle()
    assert answers[:100] == [b"250 2.1.5 Ok"] * 100
    assert all(answer.startswith(b"452 4.5.3") for answer in answers[100:-1])
    assert answers[-1].startswith(b"421 4.7.0") and len(answers) < 250


async def test_a_client_that_never_reads_is_left(records: Records) -> None:
    limits: dict[str, object] = {"junk_commands": 10_000_000, "write_timeout": "200ms", "linger": "50ms"}
    async with Upstream() as upstream, meeting(upstream, limits=limits) as (gateway, client):
        await client.hello()
        (conversation,) = gateway.pipeline.conversations
        client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a transport of both directions
        most = 0
        while not client.writer.is_closing() and gateway.pipeline.tasks:
            if client.writer.transport.get_write_buffer_size() < HIGH:
                client.send(b"HELP\r\n" * 10_000)
            kept = conversation.wire.buffered + conversation.wire.write_buffered + sum(map(len, conversation.out))
            most = max(most, kept)
            await asyncio.sleep(0)
    assert most < HIGH
    assert records.one("session")["reason"] == "time-out"


# -- too slow -------------------------------------------------------------------------------------------------


async def dribble(client: Client, data: bytes) -> None:
    """Send byte by byte, until the connection ends."""
    for at in range(len(data)):
        client.send(data[at : at + 1])
        await asyncio.sleep(0)


@pytest.mark.parametrize("what", ["commands", "one line", "responses"])
async def test_a_client_that_dribbles_has_the_time_before_login_and_no_more(what: str, records: Records) -> None:
    limits: dict[str, object] = {"login_timeout": "300ms", "junk_commands": 10_000_000, "errors": 10_000_000}
    async with Upstream() as upstream, meeting(upstream, limits=limits) as (_, client):
        await client.hello()
        answer = "250"
        while answer[:3] in ("250", "334", "501"):
            match what:
                case "commands":
                    await dribble(client, b"NOOP\r\n")
                    answer = await client.reply()
                case "responses":
                    await dribble(client, b"AUTH LOGIN\r\n")
                    answer = await client.reply()
                    if answer.startswith("334") and client.reader.at_eof() is False:
                        await dribble(client, b"dXNl")  # and never its end
                        answer = await client.reply()
                case _:
                    await dribble(client, b"NOOP nothing")
                    answer = await client.reply()
        assert answer.startswith("421 4.4.2"), answer
        assert await client.reply() == ""
    assert records.one("session")["reason"] == "time-out"


async def test_a_session_ends_in_time_whatever_it_does(records: Records) -> None:
    limits: dict[str, object] = {"session_timeout": "300ms", "junk_commands": 10_000_000}
    async with Upstream(keep=False) as upstream, meeting(upstream, limits=limits) as (_, client):
        await client.envelope("DATA")
        reading = asyncio.create_task(client.rest())
        while not reading.done():
            client.send(b"x\r\n")
            await asyncio.sleep(0)
        assert (await reading).startswith(b"421 4.4.2")
    assert upstream.messages == []
    assert records.one("session")["reason"] == "time-out"


# -- too many -------------------------------------------------------------------------------------------------


async def test_silent_connections_beyond_the_limit_are_turned_away() -> None:
    async with Upstream() as upstream, serving(upstream, limits={"sessions": 50}) as gateway, unchanged(gateway):
        pairs = [await asyncio.open_connection("127.0.0.1", gateway.port) for _ in range(200)]
        async with asyncio.timeout(20):
            greetings = [await reader.readline() for reader, _ in pairs]
            assert sum(greeting.startswith(b"220 ") for greeting in greetings) == 50
            assert sum(greeting.startswith(b"421 4.7.0") for greeting in greetings) == 150
            for _, writer in pairs:
                writer.close()
            await gateway.idle()
            async with connected(gateway) as client:
                await client.hello()


@pytest.mark.parametrize("why", ["too many", "stopping"])
async def test_whoever_expects_tls_gets_no_byte_in_clear(why: str, tls: dict[str, object], records: Records) -> None:
    """A refusal before an implicit handshake closes."""
    limits: dict[str, object] = {"sessions": 1}
    async with Upstream() as upstream, meeting(upstream, tls, limits=limits) as (gateway, client):
        await client.hello()
        assert gateway.pipeline.served is not None
        gateway.pipeline.served.draining = why == "stopping"
        async with connected(gateway, port=gateway.ports[1]) as other:
            assert await other.rest() == b""

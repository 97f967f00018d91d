from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from gateway.observe.transcript import Transcript
from gateway.protocol.errors import LocalError
from gateway.protocol.smtp import Reply
from gateway.stage import Peer as StagePeer
from gateway.upstream.dial import dial
from gateway.upstream.pool import PoolSettings
from gateway.upstream.server import Server
from gateway.upstream.smtp import Connection, UpstreamError, quits_done

pytestmark = pytest.mark.anyio

HELLO = "S: 220 mx\nC: EHLO gw.example\nS: 250-mx.example hi\nS: 250-PIPELINING\nS: 250 SIZE 1000\n"
PLAIN = "S: 220 mx\nC: EHLO gw.example\nS: 250 mx.example\n"
QUIT = "\nC: QUIT\nS: 221 bye"
Connect = Callable[..., Awaitable[Connection]]


@pytest.fixture
def connected(peers: Callable[..., Awaitable[object]]) -> Connect:
    """A connection, after EHLO, to a peer that plays the dialogue."""

    async def connect(dialogue: str, settings: PoolSettings | None = None, **options: object) -> Connection:
        peer = await peers(dialogue)
        server = Server(peer.url)  # type: ignore[attr-defined]
        connection = await dial(server, settings or PoolSettings(), hostname="gw.example", **options)  # type: ignore
        assert isinstance(connection, Connection)
        return connection

    return connect


async def test_what_stages_see(connected: Connect) -> None:
    connection = await connected(HELLO.rstrip() + QUIT)
    peer: StagePeer = connection
    assert peer.url == connection.server.url
    assert (peer.local, peer.tls) == (True, False)
    assert peer.extensions == {"PIPELINING": "", "SIZE": "1000"}
    assert peer.address[0] == peer.local_address[0] == "127.0.0.1"
    assert peer.address[1] != peer.local_address[1] != 0
    assert connection.idle
    await connection.quit()
    assert connection.wire.closed


async def test_lmtp_is_greeted_with_lhlo_and_answers_each_recipient(peers: Callable[..., Awaitable[object]]) -> None:
    """RFC 2033 4.1: a server that knows no LHLO is not asked with HELO; 4.2: the replies to the end of data."""
    peer = await peers(
        HELLO.replace("EHLO", "LHLO") + "C: DATA\nS: 354 go\nC: .\nS: 250 one\nS: 550 two" + QUIT,
        "S: 220 mx\nC: LHLO gw.example\nS: 500 what" + QUIT,
    )
    server = Server(peer.url.replace("smtp:", "lmtp:"))  # type: ignore[attr-defined]
    connection = await dial(server, PoolSettings(), hostname="gw.example")
    assert isinstance(connection, Connection)
    assert server.lmtp and connection.extensions == {"PIPELINING": "", "SIZE": "1000"}
    assert (await connection.command(b"DATA")).code == 354
    connection.end_of_data(b".\r\n", 2)
    assert [(await connection.reply()).code for _ in range(2)] == [250, 550]
    assert connection.idle
    connection.end_quietly()
    await quits_done()
    with pytest.raises(UpstreamError, match="LHLO refused: 500 what"):
        await dial(server, PoolSettings(), hostname="gw.example")
    await quits_done()


async def test_a_command_and_its_reply_of_several_lines(connected: Connect) -> None:
    connection = await connected(HELLO + "C: NOOP\nS: 250-one\nS: 250 two" + QUIT)
    assert await connection.command(b"NOOP") == Reply(250, (b"one", b"two"))
    connection.end_quietly()
    await quits_done()


@pytest.mark.parametrize("line", [b"NOOP\r\nDATA", b"NOOP\n", b"NO\0OP", b"\r"])
async def test_no_line_end_gets_into_a_command(connected: Connect, line: bytes) -> None:
    connection = await connected(HELLO.rstrip() + QUIT)
    with pytest.raises(LocalError):
        await connection.command(line)
    with pytest.raises(LocalError):
        await connection.mail(line)
    with pytest.raises(LocalError):
        connection.before_mail(line)
    await connection.quit()


async def test_pipelined_replies_come_in_order(connected: Connect) -> None:
    connection = await connected(HELLO + "C: RCPT 1\nC: RCPT 2\nS: 250 one\nS: 550 two" + QUIT)
    connection.send(b"RCPT 1\r\n")
    connection.send(b"RCPT 2\r\n")
    with pytest.raises(LocalError):
        await connection.command(b"DATA")
    assert [(await connection.reply()).code for _ in range(2)] == [250, 550]
    assert not connection.reusable, "a refusal"
    await connection.quit()


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("raw 250 o", "lost"),
        ("close", "lost"),
        ("raw 250-a\\r\\n550 b\\r\\n\nhang", "garbage"),
        ("raw hello\\r\\n\nhang", "garbage"),
        ("raw \\x16\\x03\\x01\\r\\n\nhang", "garbage"),
        ("raw " + "x" * 3000 + "\nhang", "garbage"),
        ("hang", "timeout"),
        ("raw 250-still\\r\\n\nhang", "timeout"),
    ],
)
async def test_a_reply_that_does_not_come(connected: Connect, said: str, kind: str) -> None:
    closing = "\nclose" if kind == "lost" else ""
    connection = await connected(HELLO + "C: NOOP\n" + said + closing)
    ended = 0

    def on_end() -> None:
        nonlocal ended
        ended += 1

    connection.on_end = on_end
    with pytest.raises(UpstreamError) as caught:
        await connection.command(b"NOOP", timeout=0.05 if kind == "timeout" else 30)
    assert caught.value.kind == kind
    assert caught.value.server == connection.url
    assert connection.closing and not connection.idle
    with pytest.raises(UpstreamError):
        await connection.reply()
    await connection.quit()
    connection.abort()
    assert ended == 1


async def test_421_ends_the_use_of_a_connection(connected: Connect) -> None:
    connection = await connected(HELLO + "C: NOOP\nS: 421 shutting down\nhang")
    assert (await connection.command(b"NOOP")).code == 421
    assert connection.closing
    connection.end_quietly()
    assert connection.wire.transport.is_closing(), "nobody is there to read a QUIT"


@pytest.mark.parametrize(("said", "kind"), [("421 idle too long", "lost"), ("250 ok", "garbage"), ("what?", "garbage")])
async def test_a_server_that_speaks_out_of_turn_is_not_believed(connected: Connect, said: str, kind: str) -> None:
    connection = await connected(HELLO + f"C: now\nS: {said}\nread 6")
    connection.wire.write(b"now\r\n")
    await connection.wire.wait_readable()
    with pytest.raises(UpstreamError) as caught:
        await connection.command(b"NOOP")
    assert caught.value.kind == kind
    connection.abort()


async def test_more_replies_than_commands_end_the_use_of_a_connection(connected: Connect) -> None:
    connection = await connected(HELLO + "C: NOOP\nS: 250 ok\nS: 250 ok\nhang")
    assert (await connection.command(b"NOOP")).code == 250
    assert connection.closing
    connection.abort()


async def test_an_acceptance_that_came_before_the_end_of_data_is_none(connected: Connect) -> None:
    connection = await connected(HELLO + "C: DATA\nS: 354 go\nS: 250 queued\nhang")
    assert (await connection.command(b"DATA")).code == 354
    connection.wire.write(b"hello\r\n.\r\n")
    with pytest.raises(UpstreamError, match="reply to nothing"):
        await connection.reply()
    connection.abort()


async def test_content_is_never_followed_by_quit(connected: Connect) -> None:
    connection = await connected(HELLO + "C: DATA\nS: 354 go\nC: hello")
    await connection.command(b"DATA")
    connection.wire.write(b"hello\r\n")
    await connection.wire.flush()
    await connection.quit()
    assert connection.wire.transport.is_closing()


async def test_what_goes_before_mail_goes_with_it(connected: Connect) -> None:
    connection = await connected(
        HELLO + "C: XFORWARD ADDR=192.0.2.7\nC: MAIL FROM:<>\nS: 250 thanks\nS: 250 ok\n"
        "C: DATA\nS: 354 go\nC: .\nS: 250 queued\nC: MAIL FROM:<>\nS: 250 ok" + QUIT
    )
    seen: list[Reply] = []
    connection.before_mail(b"XFORWARD ADDR=192.0.2.7", seen.append)
    assert await connection.mail(b"MAIL FROM:<>") == Reply(250, (b"ok",))
    assert seen == [Reply(250, (b"thanks",))]
    await connection.command(b"DATA")
    connection.wire.write(b".\r\n")
    await connection.reply()
    await connection.mail(b"MAIL FROM:<>")
    assert connection.transactions == 2
    await connection.quit()


async def test_without_pipelining_each_waits_for_its_reply(connected: Connect) -> None:
    connection = await connected(
        PLAIN + "C: MAIL FROM:<a@b>\nS: 250 ok\nC: RSET\nS: 250 ok\nC: XFORWARD A=1\nS: 250 ok\n"
        "C: MAIL FROM:<>\nS: 550 no\nC: MAIL FROM:<>\nS: 250 ok" + QUIT
    )
    await connection.mail(b"MAIL FROM:<a@b>")
    connection.before_mail(b"XFORWARD A=1")
    assert (await connection.mail(b"MAIL FROM:<>")).code == 550
    await connection.mail(b"MAIL FROM:<>")
    await connection.quit()


async def test_needs_reset_sends_rset_once(connected: Connect) -> None:
    connection = await connected(HELLO + "C: RSET\nC: MAIL FROM:<>\nS: 250 ok\nS: 250 ok" + QUIT)
    connection.needs_reset = True
    await connection.mail(b"MAIL FROM:<>")
    assert not connection.needs_reset
    await connection.quit()


@pytest.mark.parametrize(("reply", "kind"), [("421 bye", "lost"), ("550 no", "garbage")])
async def test_mail_is_not_said_to_have_gone_without_what_goes_before_it(
    connected: Connect, reply: str, kind: str
) -> None:
    connection = await connected(PLAIN + f"C: XFORWARD A=1\nS: {reply}")

    def insist(reply: Reply) -> None:
        if reply.code != 250:
            raise ValueError("not told")

    connection.before_mail(b"XFORWARD A=1", insist)
    with pytest.raises(UpstreamError) as caught:
        await connection.mail(b"MAIL FROM:<>")
    assert caught.value.kind == kind
    connection.abort()


async def test_helo_where_ehlo_is_unknown(connected: Connect) -> None:
    connection = await connected("S: 220 mx\nC: EHLO gw.example\nS: 502 what\nC: HELO gw.example\nS: 250 mx" + QUIT)
    assert connection.extensions == {} and connection.greeted and connection.reusable
    await connection.quit()


async def test_another_hello_replaces_what_the_last_one_said(connected: Connect) -> None:
    connection = await connected(
        HELLO + "C: EHLO client.example\nS: 250-mx\nS: 250 DSN\n"
        "C: EHLO bad\nS: 550 no\nC: HELO bad\nS: 550 no" + QUIT
    )
    assert (await connection.hello("client.example")).code == 250
    assert connection.extensions == {"DSN": ""} and not connection.pipelining
    assert (await connection.hello("bad")).code == 550
    assert connection.extensions == {} and not connection.greeted
    await connection.quit()


async def test_the_transcript_shows_no_secret(connected: Connect) -> None:
    lines: list[str] = []
    connection = await connected(
        HELLO + "C: AUTH LOGIN c2VjcmV0\nS: 334 UGFzcw==\nC: aHVudGVyMg==\nS: 235 in" + QUIT,
        transcript=Transcript("7KQ2-M9", lines.append),
    )
    await connection.command(b"AUTH LOGIN c2VjcmV0", secret=True)
    await connection.command(b"aHVudGVyMg==", secret=True)
    await connection.quit()
    text = "\n".join(lines)
    assert "c2VjcmV0" not in text and "aHVudGVyMg==" not in text and "UGFzcw==" not in text
    assert "U> EHLO gw.example" in lines and "U< 235 in" in lines and "U> QUIT" in lines


async def test_quit_gives_up_on_a_server_that_stays(connected: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.upstream.connection.QUIT_SECONDS", 0.01)
    connection = await connected(HELLO + "C: QUIT\nwait")
    released = asyncio.Event()
    connection.on_end = released.set
    connection.end_quietly()
    await quits_done()
    assert connection.wire.closed and released.is_set()

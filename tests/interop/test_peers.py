"""The peers themselves: each real program starts, does its work and is gone afterwards."""

from __future__ import annotations

import asyncio
import re

import pytest
import trustme

from tests.peers.clients import burst, dialogue, swaks, talk
from tests.peers.faults import Cut, Garble, Relay
from tests.peers.nginx import Nginx
from tests.peers.postfix import Postfix
from tests.peers.process import group_members, scratch
from tests.peers.scripted import (
    Close,
    Drip,
    Expect,
    Garbage,
    Half,
    Hang,
    NoRead,
    Reset,
    Scripted,
    Send,
    Step,
    Until,
    Wait,
)
from tests.peers.smtp_sink import SmtpSink, smtp_source

XCLIENT = "smtpd_authorized_xclient_hosts = 127.0.0.1"

real = pytest.mark.peers


@real
def test_postfix_delivers() -> None:
    with scratch() as folder, Postfix(folder, main=XCLIENT) as postfix:
        pid = postfix.pid
        sent = swaks(postfix.port, "--xclient-addr", "192.0.2.9", "--xclient-login", "joe", "--xclient-name", "h.test")
        assert sent.status == 0, sent.transcript
        assert re.match(r"250 2\.0\.0 Ok: queued as", sent.last)
        postfix.wait_log(r": removed")
        client = postfix.wait_log(r"client=(\S+), sasl_method=XCLIENT, sasl_username=(\w+)")
        assert client.groups() == ("h.test[192.0.2.9]", "joe")
        assert len(postfix.delivered()) == 1 and b"This is a test mailing" in postfix.delivered()[0]

        postfix.configure("")  # authorization withdrawn while it runs
        assert "250-XCLIENT" not in talk(postfix.port, "EHLO me.test")[1]
    assert not group_members(pid)


@real
def test_postfix_says_why_it_does_not_start() -> None:
    with scratch() as folder, pytest.raises(RuntimeError, match="bad field count"):
        Postfix(folder, master="nonsense").start()


@real
def test_two_postfix_side_by_side() -> None:
    with scratch() as one, scratch() as other, Postfix(one) as front:
        relay = f"relay_domains = relay.test\nrelay_transport = smtp:[127.0.0.1]:{front.port}"
        with Postfix(other, main=relay.replace("relay.test", "local.test") + "\nvirtual_mailbox_domains =") as behind:
            assert swaks(behind.port).status == 0
            front.wait_log(r"status=sent \(delivered to maildir\)")


@real
def test_smtp_sink_and_source() -> None:
    with scratch() as folder, SmtpSink(folder) as sink:
        run = smtp_source(sink.port, ["-s", "2", "-m", "4", "-l", "1000"])
        assert run.returncode == 0, run.stderr
        messages = sink.wait_messages(4)
        assert all(message.startswith(b"X-Client-Addr: 127.0.0.1") for message in messages)
    with scratch() as folder, SmtpSink(folder, ["-f", "RCPT"], dump=False) as sink:
        assert smtp_source(sink.port).returncode == 1
        assert swaks(sink.port).status == 24


@real
def test_nginx_passes_mail_on() -> None:
    with (
        scratch() as one, scratch() as other,
        Postfix(one, main=XCLIENT) as postfix, Nginx(other, postfix.port) as nginx,
    ):  # fmt: skip
        assert len(nginx.worker_pids()) == 1
        sent = swaks(nginx.port)
        assert sent.status == 0, sent.transcript
        login = swaks(nginx.auth_port, "--auth", "PLAIN", "--auth-user", "bob", "--auth-password", "x")
        assert login.status == 0, login.transcript
        postfix.wait_log(r"sasl_username=bob")
        nginx.wait_log('login: "bob"')
        assert swaks(nginx.auth_port, "--quit-after", "EHLO").replies[0].startswith("220 proxy.test")


@real
def test_nginx_offers_starttls() -> None:
    with scratch() as folder:
        issued = trustme.CA().issue_cert("localhost")
        chain, key = folder / "chain.pem", folder / "key.pem"
        chain.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        key.write_bytes(issued.private_key_pem.bytes())
        with SmtpSink(folder) as sink, Nginx(folder, sink.port, certificate=(chain, key), xclient=False) as nginx:
            sent = swaks(nginx.port, "--tls")
            assert sent.status == 0, sent.transcript
            assert "TLS started" in sent.transcript
            sink.wait_messages(1)


@pytest.mark.anyio
async def test_scripted_peer() -> None:
    hello: list[Step] = [Send(b"220 peer\r\n"), Expect(rb"EHLO ")]
    go = asyncio.Event()
    ends: list[Step] = [Close(), Reset(), Half(), Garbage(30), Drip(b"250 ok\r\n")]
    async with Scripted(
        *[[*hello, end] for end in ends], [*hello, Wait(go), Send(b"250 x\r\n"), Until(b"\r\n.\r\n"), Hang()]
    ) as peer:
        outcomes = []
        for _ in ends[:3]:
            try:
                outcomes.append((await asyncio.to_thread(talk, peer.port, "EHLO me"))[1])
            except ConnectionResetError:
                outcomes.append("reset")
        assert outcomes == ["", "reset", ""]
        reader, writer = await asyncio.open_connection("127.0.0.1", peer.port)
        writer.write(b"EHLO me\r\n")
        assert len(await reader.readexactly(10 + 30)) == 40
        writer.close()
        await peer.gone(4)
        assert (await asyncio.to_thread(talk, peer.port, "EHLO me"))[1] == "250 ok\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", peer.port)
        writer.write(b"EHLO me\r\nline\r\n.\r\n")
        await peer.reached(2, connection=6)
        go.set()
        assert await reader.readexactly(17) == b"220 peer\r\n250 x\r\n"
        await peer.reached(5, connection=6)
        assert peer.seen[-1] == (6, b"line\r\n.\r\n")
        writer.close()


@pytest.mark.anyio
async def test_scripted_peer_that_does_not_read() -> None:
    async with Scripted([NoRead()]) as peer:
        _, writer = await asyncio.open_connection("127.0.0.1", peer.port)
        await peer.reached(0)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                while True:
                    writer.write(bytes(1 << 20))
                    await writer.drain()
        writer.transport.abort()


@pytest.mark.anyio
async def test_scripted_peer_tells_of_surprises() -> None:
    with pytest.raises(AssertionError, match="NOOP"):
        async with Scripted([Expect(rb"EHLO")]) as peer:
            await asyncio.to_thread(burst, peer.port, b"NOOP\r\n")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("cut", "garble", "seen"),
    [
        (None, None, "220 peer\r\n250 ok\r\n"),
        (Cut("down", 12, "close"), None, "220 peer\r\n25"),
        (Cut("down", 12, "reset"), None, None),
        (None, Garble("down", 11), "220 peer\r\n2\ufffd0 ok\r\n"),
    ],
)
async def test_relay(cut: Cut | None, garble: Garble | None, seen: str | None) -> None:
    script: list[Step] = [Send(b"220 peer\r\n"), Expect(rb"EHLO"), Send(b"250 ok\r\n")]
    async with Scripted(script) as peer, Relay(peer.port, cut=cut, garble=garble) as relay:
        try:
            replies = await asyncio.to_thread(talk, relay.port, "EHLO me")
        except ConnectionResetError:
            assert seen is None
        else:
            assert "".join(replies) == seen
        await peer.gone()


@pytest.mark.anyio
async def test_black_hole() -> None:
    async with Scripted([Send(b"220 peer\r\n"), Expect(rb"EHLO"), Send(b"250 ok\r\n")]) as peer:
        async with Relay(peer.port) as relay:
            reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
            assert await reader.readline() == b"220 peer\r\n"
            relay.flow.clear()
            writer.write(b"EHLO me\r\n")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await reader.readline()
            relay.flow.set()
            assert await reader.readline() == b"250 ok\r\n"
            writer.close()
        assert (1, b"EHLO me\r\n") in peer.seen


def test_whole_dialogue_has_its_content_in_one_line() -> None:
    assert dialogue(recipients=["b@y.test"])[2:5] == [
        "RCPT TO:<b@y.test>", "DATA", "Subject: test\r\n\r\nhi\r\n.",
    ]  # fmt: skip

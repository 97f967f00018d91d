"""A real Postfix behind the gateway: what it logs of the client, what it refuses, what it stores."""

from __future__ import annotations

import asyncio

import pytest

from gateway.testing.gateway import running
from tests.interop.conftest import Authority, Records, StartPostfix
from tests.interop.mail_client import STRANGER, MailClient, Mode, by_sender, connected, without_trace
from tests.interop.postfix_upstream import (
    AUTHORIZED,
    DISCARD_FOREIGN,
    ELSEWHERE,
    FOREIGN,
    GRADES,
    LOGIN_RELAYS,
    MESSAGE,
    SHORT,
    Stages,
    both_grades,
    certificate,
    handed_off,
    logged,
    pipeline,
    stored,
)
from tests.peers.clients import talk
from tests.peers.dovecot import Dovecot
from tests.peers.postfix import Postfix
from tests.peers.process import wait_for

pytestmark = [pytest.mark.peers, pytest.mark.anyio]

# -- who the client is ----------------------------------------------------------------------------------------


PROXY = b"PROXY TCP4 192.0.2.9 192.0.2.1 4711 25\r\n"


@both_grades
@pytest.mark.parametrize("way", ["itself", "proxy", "xclient"])
async def test_logs_the_client(start_postfix: StartPostfix, records: Records, grade: str, way: str) -> None:
    postfix = start_postfix(main=AUTHORIZED)
    trust = {"proxy": [STRANGER], "xclient": [STRANGER] if way == "xclient" else []}
    served = pipeline(postfix, GRADES[grade], trust=trust)
    if way == "proxy":
        served["listen"] = [{"url": "smtp://127.0.0.1:0", "proxy_protocol": "required"}]
    async with running(served, learn=True) as gateway:
        async with connected(gateway.port, first=PROXY if way == "proxy" else b"") as client:
            if way == "xclient":
                reply = await client.say("XCLIENT ADDR=192.0.2.9 NAME=spike.test PORT=4711")
                assert reply.startswith("220"), reply
                await client.say("EHLO client.test")
            assert (await client.envelope("user@local.test")).startswith("250")
            assert (await client.content(MESSAGE)).startswith("250")
            assert (await client.say("QUIT")).startswith("221")
        await gateway.idle()
    name = "spike.test" if way == "xclient" else "unknown"
    address = STRANGER if way == "itself" else "192.0.2.9"
    await logged(postfix, rf"client={name}\[{address}\]$")
    (message,) = await stored(postfix, 1)
    assert f"Received: from client.test ({name} [{address}])" in message.decode()
    assert handed_off(records) == (grade == "opaque")


@both_grades
async def test_logs_the_login(
    start_postfix: StartPostfix, records: Records, users: dict[str, object], grade: str
) -> None:
    postfix = start_postfix(main=AUTHORIZED)
    served = pipeline(postfix, [users, *GRADES[grade]], allow_plaintext_auth=True)
    async with running(served, learn=True) as gateway:
        async with connected(gateway.port) as client:
            assert (await client.envelope("user@local.test")).startswith("530")
            assert (await client.login("joe@example.org", "secret")).startswith("235")
            assert (await client.envelope("user@local.test")).startswith("250")
            assert (await client.content(MESSAGE)).startswith("250")
        await gateway.idle()
    await logged(postfix, rf"client=unknown\[{STRANGER}\], sasl_method=XCLIENT, sasl_username=joe@example.org$")
    assert handed_off(records) == (grade == "opaque")


async def test_login_lets_postfix_relay(
    start_postfix: StartPostfix, records: Records, users: dict[str, object], dovecot: Dovecot
) -> None:
    """Postfix looks at LOGIN only with `smtpd_sasl_auth_enable`; it then offers AUTH, which the client must not see."""
    postfix = start_postfix(main=AUTHORIZED + LOGIN_RELAYS + DISCARD_FOREIGN + dovecot.main)
    auth = {"auth_file": {**users["auth_file"], "required": False}}  # type: ignore[dict-item]
    served = pipeline(postfix, [auth, "xclient", "splice"], allow_plaintext_auth=True)
    async with running(served, learn=True) as gateway:
        async with connected(gateway.port) as client:
            assert (await client.envelope(FOREIGN)).startswith("554 5.7.1")
            assert (await client.say("RCPT TO:<user@local.test>")).startswith("250")
        async with connected(gateway.port) as client:
            assert (await client.login("joe@example.org", "secret")).startswith("235")
            assert (await client.envelope(FOREIGN)).startswith("250")
            assert (await client.content(MESSAGE)).startswith("250")
        await gateway.idle()
    await logged(postfix, rf"client=unknown\[{STRANGER}\], sasl_method=XCLIENT, sasl_username=joe@example.org$")
    assert not handed_off(records)


# -- no open relay --------------------------------------------------------------------------------------------


def unauthorized(records: Records) -> None:
    """One record for each refused MAIL, which tells the operator what to mend."""
    refusals = records.all("refusal")
    assert {(refusal["phase"], refusal["cause"]) for refusal in refusals} == {("mail", "upstream misconfigured")}
    assert len(refusals) == 2  # one for each MAIL
    assert all("smtpd_authorized_xclient_hosts" in str(refusal["detail"]) for refusal in refusals)


async def nothing_is_taken(client: MailClient) -> None:
    """A client that minds no refusal; the first says why."""
    reply = await client.say("MAIL FROM:<a@x.test>")
    assert reply.startswith("451 4.3.5"), reply
    for line in (f"RCPT TO:<{FOREIGN}>", "RCPT TO:<user@local.test>", "DATA"):
        assert (await client.say(line))[0] in "45"
    await client.send(f"RSET\r\nMAIL FROM:<>\r\nRCPT TO:<{FOREIGN}>\r\nRCPT TO:<user@local.test>\r\nDATA\r\n".encode())
    assert [(await client.reply())[:1] for _ in range(5)] == ["2", "4", "5", "5", "5"]


@both_grades
async def test_not_authorized(start_postfix: StartPostfix, records: Records, grade: str) -> None:
    """The gateway is in mynetworks: what Postfix took for the gateway's own mail, it would relay."""
    postfix = start_postfix()
    taken = await asyncio.to_thread(talk, postfix.port, "EHLO g.test", "MAIL FROM:<a@x.test>", f"RCPT TO:<{FOREIGN}>")
    assert taken[-1].startswith("250")  # or the test proves nothing
    async with running(pipeline(postfix, GRADES[grade]), learn=True) as gateway:
        async with connected(gateway.port) as client:
            await nothing_is_taken(client)
        await gateway.idle()
    unauthorized(records)
    assert postfix.log().count(" client=") == 1  # that of the talk above
    assert not postfix.delivered()


async def withdraw(postfix: Postfix, main: str = "") -> None:
    """Take the authorization away and wait until no process of the old configuration answers."""
    await asyncio.to_thread(postfix.configure, main)
    await asyncio.to_thread(
        wait_for, lambda: "XCLIENT" not in talk(postfix.port, "EHLO g.test")[1], "the end of the old configuration"
    )


@both_grades
async def test_authorization_withdrawn(start_postfix: StartPostfix, records: Records, grade: str) -> None:
    postfix = start_postfix(main=AUTHORIZED)
    async with running(pipeline(postfix, GRADES[grade]), learn=True) as gateway:
        async with connected(gateway.port) as before:
            assert (await before.envelope("user@local.test")).startswith("250")
            await withdraw(postfix)
            async with connected(gateway.port) as client:
                await nothing_is_taken(client)
            # The session from before is still the client's own at Postfix.
            assert (await before.content(MESSAGE)).startswith("250")
            assert (await before.envelope(FOREIGN)).startswith("454 4.7.1")
        await gateway.idle()
    unauthorized(records)
    assert f"to=<{FOREIGN}>, relay=" not in postfix.log()


async def test_authorization_withdrawn_during_a_session(start_postfix: StartPostfix, records: Records) -> None:
    """An upstream that left is replaced by one that no longer believes the gateway: nothing is relayed."""
    postfix = start_postfix(main=AUTHORIZED + SHORT)
    async with running(pipeline(postfix, GRADES["envelope"]), learn=True) as gateway:
        async with connected(gateway.port) as client:
            assert (await client.envelope("user@local.test")).startswith("250")
            assert (await client.content(MESSAGE)).startswith("250")
            await logged(postfix, "timeout after END-OF-MESSAGE")
            await withdraw(postfix)
            await nothing_is_taken(client)
        await gateway.idle()
    unauthorized(records)


# -- byte for byte --------------------------------------------------------------------------------------------


BODIES = {
    "usual": b"From: a@x.test\r\nSubject: usual\r\n\r\nhello\r\n",
    "dots": b"Subject: dots\r\n\r\n.\r\n..\r\n...x\r\n. \r\n.x\r\n\r\n.\r\n",
    "long": b"Subject: long\r\n\r\n" + b"x" * 998 + b"\r\n" + b"y." * 40_000 + b"\r\n" + b"." * 3000 + b"\r\n",
    "eight_bit": b"Subject: \xc3\xa4\r\n\r\n" + bytes(range(128, 256)) * 3 + b"\r\n",
    "empty": b"",
    "head_only": b"Subject: head only\r\n",
    "body_only": b"\r\nno head\r\n",
    "odd_head": b"not a field\r\n\r\nX: y\r\n folded\r\n",
    "blank_end": b"Subject: blank\r\n\r\ntext  \r\n\t\r\n \r\n\r\n\r\n",
    "folded": b"Received: from a\r\n\tby b\r\nSubject:\r\n folded\r\n\tagain\r\n\r\nx\r\n",
    "controls": b"Subject: controls\r\n\r\n\x01\x08\x0c\x1a\x1b\x7f\t\r\n",
    "megabyte": b"Subject: big\r\n\r\n" + b"".join(b"%072d\r\n" % number for number in range(14_000)),
}
CHUNKS = {
    "chunks_no_end": (b"Subject: no end\r\n\r\nno final line end",),
    "chunks_cut": (b"Subject: cut\r", b"\n\r\n.", b"\r\n.", b".\r", b"\n", b".\r\nx"),
    "chunks_dots": (b"Subject: dots\r\n\r\n", b".\r\n", b".\r\n"),
    "chunks_empty": (b"",),
}


async def send_all(client: MailClient, prefix: str) -> None:
    """Every body in one session, each from a sender of its own."""
    for name, message in BODIES.items():
        reply = await client.envelope("user@local.test", sender=f"{prefix}.{name}@x.test", parameters=" BODY=8BITMIME")
        assert reply.startswith("250"), (name, reply)
        assert (await client.content(message)).startswith("250"), name
    for name, chunks in CHUNKS.items():
        assert (await client.envelope("user@local.test", sender=f"{prefix}.{name}@x.test")).startswith("250")
        assert (await client.chunks(*chunks)).startswith("250"), name
    assert (await client.say("QUIT")).startswith("221")


@both_grades
@pytest.mark.parametrize(("mode", "upstream"), [("plain", "smtp"), ("starttls", "required"), ("tls", "smtps")])
async def test_byte_for_byte(
    start_postfix: StartPostfix, records: Records, authority: Authority, tls: dict[str, object], grade: str, mode: Mode,
    upstream: str,
) -> None:  # fmt: skip
    """The same mail sent straight and through the gateway is stored the same apart from trace fields.

    The gateway's address is none of Postfix's own: else Postfix, XCLIENT or not, completes the header of what it
    takes for local mail (`local_header_rewrite_clients`).
    """
    postfix = start_postfix(
        main=f"smtpd_authorized_xclient_hosts = {ELSEWHERE}\n" + certificate(*authority.issue("mx.test")),
        smtpd_options="-o smtpd_tls_wrappermode=yes" if upstream == "smtps" else "",
    )
    scheme = "smtps" if upstream == "smtps" else "smtp"
    straight: Mode = {"smtp": "plain", "required": "starttls", "smtps": "tls"}[upstream]  # type: ignore[assignment]
    async with connected(postfix.port, mode=straight, ca=authority.ca, name="mx.test") as client:
        await send_all(client, "straight")
    pool: dict[str, object] = {"tls": "off" if upstream == "smtp" else "required", "ca_file": str(authority.ca),
                               "server_name": "mx.test", "source": ELSEWHERE}  # fmt: skip
    listen = [f"{'smtps' if mode == 'tls' else 'smtp'}://127.0.0.1:0"]
    served = pipeline(postfix, GRADES[grade], url=f"{scheme}://127.0.0.1:{postfix.port}", pool=pool, tls=tls,
                      listen=listen)  # fmt: skip
    async with running(served, learn=True) as gateway:
        async with connected(gateway.port, mode=mode, ca=authority.ca, name="gateway.test") as client:
            await send_all(client, "through")
        await gateway.idle()
    names = [*BODIES, *CHUNKS]
    found = by_sender(await stored(postfix, 2 * len(names)))
    for name in names:
        one, other = (without_trace(found[f"{way}.{name}@x.test"]) for way in ("straight", "through"))
        assert one == other, name
    assert handed_off(records) == (grade == "opaque")


# -- an impatient upstream ------------------------------------------------------------------------------------


async def test_upstream_times_out_between_commands(start_postfix: StartPostfix) -> None:
    """Wherever the client pauses, its session and its envelope survive that the upstream leaves."""
    postfix = start_postfix(main=AUTHORIZED + SHORT)
    left = 0

    async def pause() -> None:
        nonlocal left
        left += 1
        await logged(postfix, rf"(?s)(timeout after.*){{{left}}}")

    async with (
        running(pipeline(postfix, GRADES["envelope"]), learn=True) as gateway,
        connected(gateway.port) as client,
    ):
        for lines in (["MAIL FROM:<a@x.test>"], ["RCPT TO:<user@local.test>"], ["RCPT TO:<other@local.test>"]):
            for line in lines:
                assert (await client.say(line)).startswith("250"), line
            await pause()
        assert (await client.content(MESSAGE)).startswith("250")
        await pause()
        assert (await client.envelope("user@local.test")).startswith("250")
        assert (await client.content(MESSAGE)).startswith("250")
        await pause()
        assert (await client.say("NOOP")).startswith("250")
        assert (await client.say("RSET")).startswith("250")
        assert (await client.envelope("user@local.test")).startswith("250")
        await pause()
        assert (await client.say("RSET")).startswith("250")
        assert (await client.envelope("user@local.test")).startswith("250")
        assert (await client.content(MESSAGE)).startswith("250")
        assert (await client.say("QUIT")).startswith("221")
    assert len(await stored(postfix, 3)) == 3
    assert len(await stored(postfix, 1, "other")) == 1


@both_grades
async def test_upstream_times_out_after_login(start_postfix: StartPostfix, dovecot: Dovecot, grade: str) -> None:
    """Where the login went upstream there is something to lose between AUTH and MAIL; the login is repeated."""
    postfix = start_postfix(main=dovecot.main + LOGIN_RELAYS + DISCARD_FOREIGN + SHORT)
    stages: Stages = [{"upstream_auth": {"credentials": "client", "verify": "upstream"}}, *GRADES[grade][1:]]
    async with (
        running(pipeline(postfix, stages, allow_plaintext_auth=True), learn=True) as gateway,
        connected(gateway.port) as client,
    ):
        assert (await client.login("joe@example.org", "secret")).startswith("235")
        await logged(postfix, "timeout after AUTH")
        assert (await client.envelope(FOREIGN)).startswith("250")
        assert (await client.content(MESSAGE)).startswith("250")
    await logged(postfix, "sasl_username=joe@example.org")


async def test_upstream_times_out_during_content(start_postfix: StartPostfix) -> None:
    """What went upstream is lost with it: 451, nothing stored, and the session goes on."""
    postfix = start_postfix(main=AUTHORIZED + SHORT)
    async with (
        running(pipeline(postfix, GRADES["envelope"]), learn=True) as gateway,
        connected(gateway.port) as client,
    ):
        await client.envelope("user@local.test")
        assert (await client.say("DATA")).startswith("354")
        await client.send(b"Subject: half\r\n\r\n")
        await logged(postfix, "timeout after DATA")
        assert (await client.end(b"the other half\r\n")).startswith("451 4.4.2")
        assert (await client.envelope("user@local.test")).startswith("250")
        assert (await client.content(MESSAGE)).startswith("250")
    (message,) = await stored(postfix, 1)
    assert b"Subject: test" in message

"""A real Postfix behind the gateway: what it logs of the client, what it refuses, what it stores."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.testing.gateway import running
from tests.interop.conftest import Authority, Records, StartPostfix
from tests.interop.mail_client import STRANGER, MailClient, Mode, by_sender, connected, without_trace
from tests.peers.clients import swaks, talk
from tests.peers.postfix import Postfix
from tests.peers.process import wait_for

pytestmark = [pytest.mark.peers, pytest.mark.anyio]

AUTHORIZED = "smtpd_authorized_xclient_hosts = 127.0.0.1\n"
LOGIN_RELAYS = "smtpd_relay_restrictions = permit_sasl_authenticated, permit_mynetworks, reject_unauth_destination\n"
HOLD_FOREIGN = "relay_transport = retry:4.0.0 kept\ndefault_transport = retry:4.0.0 kept\n"
SHORT = "smtpd_timeout = 1s\n"
FOREIGN = "somebody@foreign.test"

Stages = list[object]
GRADES: dict[str, Stages] = {
    "opaque": ["xclient", "splice"],
    "envelope": ["xclient", {"splice": {"handoff": "never"}}],
}
both_grades = pytest.mark.parametrize("grade", GRADES)
MESSAGE = b"Subject: test\r\n\r\nhello\r\n"


def pipeline(postfix: Postfix, stages: Stages, *, url: str = "", pool: dict[str, object] | None = None,
             **more: object) -> dict[str, object]:  # fmt: skip
    """A pipeline with this Postfix as its only upstream."""
    servers = [url or f"smtp://127.0.0.1:{postfix.port}"]
    return {"stages": stages, "upstreams": {"postfix": {"servers": servers, **(pool or {})}}, **more}


def certificate(chain: Path, key: Path, level: str = "may") -> str:
    """Postfix's TLS."""
    return (
        f"smtpd_tls_cert_file = {chain}\nsmtpd_tls_key_file = {key}\nsmtpd_tls_security_level = {level}\n"
        "smtpd_tls_loglevel = 1\nsmtpd_tls_received_header = yes\n"
    )


async def logged(postfix: Postfix, pattern: str) -> None:
    """Wait for a line in Postfix's log."""
    await asyncio.to_thread(postfix.wait_log, pattern)


async def stored(postfix: Postfix, count: int, mailbox: str = "user") -> list[bytes]:
    """Wait until a mailbox has this many messages."""
    await asyncio.to_thread(wait_for, lambda: len(postfix.delivered(mailbox)) >= count, f"{count} messages")
    return postfix.delivered(mailbox)


async def handed_off(records: Records) -> bool:
    """Whether the only session was handed off."""
    return "upstream" in records.one("session")


@pytest.fixture
def users(tmp_path: Path) -> dict[str, object]:
    """`auth_file` with the user joe@example.org and the password secret."""
    path = tmp_path / "users"
    path.write_text("joe@example.org:{PLAIN}secret\n")
    return {"auth_file": {"file": str(path)}}


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
    assert await handed_off(records) == (grade == "opaque")


@both_grades
async def test_login_goes_along(
    start_postfix: StartPostfix, records: Records, users: dict[str, object], grade: str
) -> None:
    """Postfix logs the login and lets it relay; without a login it relays for nobody."""
    postfix = start_postfix(main=AUTHORIZED + LOGIN_RELAYS + HOLD_FOREIGN)
    stages = [{"auth_file": {**users["auth_file"], "required": False}}, *GRADES[grade]]  # type: ignore[dict-item]
    async with running(pipeline(postfix, stages, allow_plaintext_auth=True), learn=True) as gateway:
        async with connected(gateway.port) as client:
            assert (await client.login("joe@example.org", "secret")).startswith("235")
            assert (await client.envelope(FOREIGN)).startswith("250")
            assert (await client.content(MESSAGE)).startswith("250")
        async with connected(gateway.port) as client:
            assert (await client.envelope(FOREIGN)).startswith("554 5.7.1")
            assert (await client.say("RCPT TO:<user@local.test>")).startswith("250")
        await gateway.idle()
    await logged(postfix, rf"client=unknown\[{STRANGER}\], sasl_method=XCLIENT, sasl_username=joe@example.org$")
    assert "Relay access denied" in postfix.log()
    assert [("upstream" in session) for session in records.all("session")] == [grade == "opaque"] * 2


# -- no open relay --------------------------------------------------------------------------------------------


def unauthorized(records: Records) -> None:
    """The one record that tells the operator what to mend."""
    (refusal,) = [record for record in records.all("refusal") if "smtpd_authorized_xclient_hosts" in str(record)]
    assert refusal["phase"] == "mail"
    assert refusal["cause"] == "upstream_misconfigured"


async def nothing_is_taken(client: MailClient) -> None:
    """A client that minds no refusal; the first says why."""
    reply = await client.say("MAIL FROM:<a@x.test>")
    assert reply.startswith("451 4.3.5"), reply
    for line in (f"RCPT TO:<{FOREIGN}>", "RCPT TO:<user@local.test>", "DATA"):
        assert (await client.say(line))[0] in "45"


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
    assert " client=" not in postfix.log().partition(f"rcpt=1")[2]
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
    """The same mail sent straight and through the gateway is stored the same apart from trace fields."""
    postfix = start_postfix(
        main=AUTHORIZED + certificate(*authority.issue("mx.test")),
        smtpd_options="-o smtpd_tls_wrappermode=yes" if upstream == "smtps" else "",
    )
    scheme = "smtps" if upstream == "smtps" else "smtp"
    straight: Mode = {"smtp": "plain", "required": "starttls", "smtps": "tls"}[upstream]  # type: ignore[assignment]
    async with connected(postfix.port, mode=straight, ca=authority.ca, name="mx.test") as client:
        await send_all(client, "straight")
    pool: dict[str, object] = {"tls": "off" if upstream == "smtp" else "required", "ca_file": str(authority.ca),
                               "server_name": "mx.test"}  # fmt: skip
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
    assert await handed_off(records) == (grade == "opaque")


# -- an impatient upstream ------------------------------------------------------------------------------------


async def test_upstream_times_out_between_commands(start_postfix: StartPostfix) -> None:
    """Wherever the client pauses, its session and its envelope survive that the upstream leaves."""
    postfix = start_postfix(main=AUTHORIZED + SHORT)
    left = 0

    async def pause() -> None:
        nonlocal left
        left += 1
        await logged(postfix, rf"(?s)(timeout after.*){{{left}}}")

    async with running(pipeline(postfix, GRADES["envelope"]), learn=True) as gateway:
        async with connected(gateway.port) as client:
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


async def test_upstream_times_out_during_content(start_postfix: StartPostfix) -> None:
    """What went upstream is lost with it: 451, nothing stored, and the session goes on."""
    postfix = start_postfix(main=AUTHORIZED + SHORT)
    async with running(pipeline(postfix, GRADES["envelope"]), learn=True) as gateway:
        async with connected(gateway.port) as client:
            await client.envelope("user@local.test")
            assert (await client.say("DATA")).startswith("354")
            await client.send(b"Subject: half\r\n\r\n")
            await logged(postfix, "timeout after DATA")
            assert (await client.end(b"the other half\r\n")).startswith("451 4.4.2")
            assert (await client.envelope("user@local.test")).startswith("250")
            assert (await client.content(MESSAGE)).startswith("250")
    (message,) = await stored(postfix, 1)
    assert b"Subject: test" in message


# -- XFORWARD and PROXY headers -------------------------------------------------------------------------------


async def test_xforward(start_postfix: StartPostfix, records: Records) -> None:
    postfix = start_postfix(main="smtpd_authorized_xforward_hosts = 127.0.0.1\n")
    served = pipeline(postfix, ["xforward", "splice"], relay="open")
    async with running(served, learn=True) as gateway, connected(gateway.port) as client:
        for _ in range(2):
            assert (await client.envelope("user@local.test")).startswith("250")
            assert (await client.content(MESSAGE)).startswith("250")
    ids = [record["id"] for record in records.all("transaction")]
    assert len(ids) == 2
    for ident in ids:
        await logged(postfix, rf"orig_queue_id={ident}, orig_client=unknown\[{STRANGER}\]")
    messages = await stored(postfix, 2)
    assert all(b"Received: from client.test (unknown [127.0.0.5])" in message for message in messages)


async def test_xforward_not_authorized(start_postfix: StartPostfix, records: Records) -> None:
    """It is for logs only: mail goes on where it is not offered, unless told otherwise."""
    postfix = start_postfix()
    for setting, code in (("continue", "250"), ("tempfail", "451 4.3.5")):
        served = pipeline(postfix, [{"xforward": setting}, "splice"], relay="open")
        async with running(served, learn=True) as gateway, connected(gateway.port) as client:
            assert (await client.say("MAIL FROM:<a@x.test>")).startswith(code)
    (refusal,) = records.all("refusal")
    assert "smtpd_authorized_xforward_hosts" in str(refusal["detail"])


@pytest.mark.parametrize("version", [1, 2])
@both_grades
async def test_proxy_header(start_postfix: StartPostfix, records: Records, grade: str, version: int) -> None:
    postfix = start_postfix(main="smtpd_upstream_proxy_protocol = haproxy\nsmtpd_upstream_proxy_timeout = 2s\n")
    stages: Stages = [{"proxy_header": version}, *GRADES[grade][1:]]
    async with running(pipeline(postfix, stages), learn=True) as gateway:
        async with connected(gateway.port) as client:
            assert (await client.envelope(FOREIGN)).startswith("454 4.7.1")
            assert (await client.say("RCPT TO:<user@local.test>")).startswith("250")
            assert (await client.content(MESSAGE)).startswith("250")
        await gateway.idle()
    await logged(postfix, rf"connect from unknown\[{STRANGER}\]")
    await logged(postfix, rf"client=unknown\[{STRANGER}\]")
    await stored(postfix, 1)
    assert await handed_off(records) == (grade == "opaque")


async def test_proxy_header_not_expected(start_postfix: StartPostfix) -> None:
    """Postfix takes the header for garbage: nothing is relayed, the refusal is temporary."""
    postfix = start_postfix()
    async with running(pipeline(postfix, [{"proxy_header": 1}, "splice"]), learn=True) as gateway:
        replies = await asyncio.to_thread(talk, gateway.port, "EHLO c.test", "MAIL FROM:<a@x.test>", f"RCPT TO:<{FOREIGN}>")
    assert not [reply for reply in replies[2:] if reply.startswith("2")], replies
    assert next(reply for reply in replies if reply[0] in "45")[0] == "4"
    assert "client=" not in postfix.log()

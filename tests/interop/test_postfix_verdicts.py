"""What a real Postfix says reaches the client as it said it; what it cannot say because it is gone, we say."""

from __future__ import annotations

import asyncio

import pytest

from gateway.testing.gateway import running
from tests.interop.conftest import Records, StartPostfix
from tests.interop.mail_client import STRANGER, connected
from tests.interop.postfix_upstream import AUTHORIZED, GRADES, MESSAGE, both_grades, logged, pipeline, stored

pytestmark = [pytest.mark.peers, pytest.mark.anyio]

BAN = """\
smtpd_client_restrictions = check_client_access inline:{{ {{{client} = {action}}} }}
smtpd_delay_reject = {delay}
"""


@both_grades
@pytest.mark.parametrize("delay", ["no", "yes"])
@pytest.mark.parametrize(("action", "code"), [("REJECT you are banned", "554 5.7.1"), ("450 4.7.9 later", "450 4.7.9")])
async def test_verdict_on_the_client(
    start_postfix: StartPostfix, grade: str, delay: str, action: str, code: str
) -> None:
    """Postfix judges the address that XCLIENT told it, in its new greeting or at RCPT."""
    postfix = start_postfix(main=AUTHORIZED + BAN.format(client=STRANGER, action=action, delay=delay))
    async with running(pipeline(postfix, GRADES[grade]), learn=True) as gateway:
        async with connected(gateway.port) as client:
            reply = await client.envelope("user@local.test")
            assert reply.startswith(code), reply
            assert action.split()[-1] in reply
        async with connected(gateway.port, source="127.0.0.6") as client:
            assert (await client.envelope("user@local.test")).startswith("250")
    assert not postfix.delivered()


@both_grades
async def test_refused_recipients(start_postfix: StartPostfix, grade: str) -> None:
    postfix = start_postfix(main=AUTHORIZED)
    async with running(pipeline(postfix, GRADES[grade]), learn=True) as gateway, connected(gateway.port) as client:
        assert (await client.envelope("nobody@local.test")).startswith("550 5.1.1 <nobody@local.test>: Recipient")
        assert (await client.say("DATA")).startswith("554 5.5.1")
        assert (await client.say("RCPT TO:<user@local.test>")).startswith("250 2.1.5")
        assert (await client.say("RCPT TO:<nobody@local.test>")).startswith("550 5.1.1")
        assert (await client.content(MESSAGE)).startswith("250 2.0.0 Ok: queued as")
    assert len(await stored(postfix, 1)) == 1


@both_grades
async def test_too_big(start_postfix: StartPostfix, grade: str) -> None:
    """Known from SIZE at MAIL, else at the end of data; nothing is stored and the session goes on."""
    postfix = start_postfix(main=AUTHORIZED + "message_size_limit = 2000\n")
    async with running(pipeline(postfix, GRADES[grade]), learn=True) as gateway, connected(gateway.port) as client:
        assert "SIZE 2000" in await client.say("EHLO client.test")
        assert (await client.envelope("user@local.test")).startswith("250")
        assert (await client.content(b"Subject: big\r\n\r\n" + b"x" * 70 + b"\r\n" * 2000)).startswith("552 5.3.4")
        assert (await client.envelope("user@local.test")).startswith("250")
        assert (await client.content(MESSAGE)).startswith("250")
        assert (await client.say("MAIL FROM:<a@x.test> SIZE=2001")).startswith("552 5.3.4")
    assert len(await stored(postfix, 1)) == 1


@both_grades
async def test_extensions_are_carried(start_postfix: StartPostfix, grade: str) -> None:
    """SMTPUTF8 and DSN: Postfix gets the parameters as they are."""
    postfix = start_postfix(main=AUTHORIZED + "smtputf8_enable = yes\ndefault_transport = discard:\n")
    async with running(pipeline(postfix, GRADES[grade]), learn=True) as gateway, connected(gateway.port) as client:
        ehlo = await client.say("EHLO client.test")
        assert all(keyword in ehlo for keyword in ("SMTPUTF8", "DSN", "8BITMIME", "PIPELINING", "CHUNKING"))
        reply = await client.say("MAIL FROM:<\u00e4@x.test> SMTPUTF8 BODY=8BITMIME RET=HDRS ENVID=id+2B7")
        assert reply.startswith("250"), reply
        reply = await client.say("RCPT TO:<user@local.test> NOTIFY=SUCCESS,FAILURE ORCPT=rfc822;first@x.test")
        assert reply.startswith("250"), reply
        assert (await client.content("Subject: \u00fc\r\n\r\n\u00df\r\n".encode())).startswith("250")
        assert (await client.say("MAIL FROM:<a@x.test> NONSENSE=1")).startswith("555")
    (message,) = await stored(postfix, 1)
    assert message.startswith("Return-Path: <\u00e4@x.test>\n".encode())
    await logged(postfix, "sender delivery status notification")


async def test_postfix_restarts(start_postfix: StartPostfix, records: Records) -> None:
    """While it is away a client is told to come again, and its session serves it once Postfix is back."""
    postfix = start_postfix(main=AUTHORIZED)
    async with running(pipeline(postfix, GRADES["envelope"]), learn=True) as gateway, connected(gateway.port) as client:
        assert (await client.envelope("user@local.test")).startswith("250")
        await asyncio.to_thread(postfix.stop)
        reply = await client.content(MESSAGE)
        assert reply.startswith("451 4.4"), reply
        assert (await client.say("RSET")).startswith("250")
        assert (await client.envelope("user@local.test")).startswith("451 4.4")
        await asyncio.to_thread(postfix.start)
        reply = await client.envelope("user@local.test")
        assert reply.startswith("250"), reply
        assert (await client.content(MESSAGE)).startswith("250")
    assert len(await stored(postfix, 1)) == 1
    assert not records.all("internal_error")


@both_grades
async def test_postfix_loses_patience(start_postfix: StartPostfix, grade: str) -> None:
    """Its 421 for too many errors ends this upstream connection; in the envelope grade not the client's session."""
    postfix = start_postfix(main=AUTHORIZED + "smtpd_hard_error_limit = 3\nsmtpd_error_sleep_time = 0\n")
    async with running(pipeline(postfix, GRADES[grade]), learn=True) as gateway, connected(gateway.port) as client:
        await client.say("MAIL FROM:<a@x.test>")
        replies = [await client.say("RCPT TO:<nobody@local.test>") for _ in range(3)]
        assert [reply[:3] for reply in replies[:2]] == ["550", "550"]
        reply = await client.say("RCPT TO:<user@local.test>")
        assert reply[:3] in (("421", "") if grade == "opaque" else ("250",)), [*replies, reply]

"""A real Postfix behind the gateway: what it logs of the client, what it refuses, what it stores."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from gateway.testing.gateway import Gateway, running
from tests.interop.conftest import Authority, Records, StartPostfix
from tests.interop.mail_client import STRANGER, Mode, by_sender, connected, without_trace
from tests.peers.postfix import Postfix
from tests.peers.process import wait_for

pytestmark = [pytest.mark.peers, pytest.mark.anyio]

AUTHORIZED = "smtpd_authorized_xclient_hosts = 127.0.0.1\n"
LOGIN_RELAYS = "smtpd_relay_restrictions = permit_sasl_authenticated, permit_mynetworks, reject_unauth_destination\n"
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


async def logged(postfix: Postfix, pattern: str) -> None:
    """Wait for a line in Postfix's log."""
    await asyncio.to_thread(postfix.wait_log, pattern)


async def stored(postfix: Postfix, count: int, mailbox: str = "user") -> list[bytes]:
    """Wait until a mailbox has this many messages."""
    await asyncio.to_thread(wait_for, lambda: len(postfix.delivered(mailbox)) >= count, f"{count} messages")
    return postfix.delivered(mailbox)


# -- who the client is ----------------------------------------------------------------------------------------


@both_grades
async def test_logs_the_client(start_postfix: StartPostfix, records: Records, grade: str) -> None:
    postfix = start_postfix(main=AUTHORIZED)
    async with running(pipeline(postfix, GRADES[grade]), learn=True) as gateway:
        async with connected(gateway.port) as client:
            assert (await client.envelope("user@local.test")).startswith("250")
            assert (await client.content(MESSAGE)).startswith("250")
            assert (await client.say("QUIT")).startswith("221")
        await gateway.idle()
    await logged(postfix, rf"client=unknown\[{STRANGER}\]")
    (message,) = await stored(postfix, 1)
    assert b"Received: from client.test (unknown [127.0.0.5])" in message
    assert len(records.all("hand_off")) == (grade == "opaque")

"""A filter that does not come to an end with its changes: what is kept of them has a bound."""

from __future__ import annotations

import pytest

from gateway.upstream.milter import MAX_CHANGES, MAX_CHANGES_SIZE
from tests.fault.baseline import unchanged
from tests.fault.client import connected
from tests.fault.test_milter import CONTENT, QUEUED, asks, delivered, send, serving
from tests.fault.upstream import Upstream
from tests.interop.conftest import Records
from tests.peers.scripted_milter import (
    CONTINUE,
    Answer,
    Hang,
    ScriptedMilter,
    add_header,
    options,
    quarantine,
    replace_body,
)

pytestmark = pytest.mark.anyio
LARGE = add_header(b"X", b"y" * 60_000)
ENDLESS = {
    "small fields": (options(), add_header(b"X", b"y") * (MAX_CHANGES + 1)),
    "large fields": (options(), LARGE * (MAX_CHANGES_SIZE // len(LARGE) + 8)),
    "what it did not announce": (options(actions=0), quarantine(b"x") * (MAX_CHANGES + 1)),
}


@pytest.mark.parametrize("kind", ENDLESS)
async def test_changes_without_end(kind: str, records: Records) -> None:
    greeting, changes = ENDLESS[kind]
    async with (
        Upstream() as upstream,
        ScriptedMilter({"eom": [Answer(changes), Hang()]}, {}, greeting=greeting) as milter,
        serving(upstream, asks(milter, timeout="60s")) as gateway,
        unchanged(gateway),
        connected(gateway) as client,
    ):
        await client.hello()
        told, answer = await send(client)
        assert told == "end" and answer.startswith("451 4.3.0 ")
        assert await send(client) == ("end", QUEUED)
    assert "too many changes" in str(records.one("stage_failure")["error"]) and delivered(upstream) == [CONTENT]


async def test_a_new_body_is_not_counted(records: Records) -> None:
    body = b"z" * 70 + b"\r\n"
    pieces = [replace_body(body * 800)] * (MAX_CHANGES_SIZE // len(body * 800) + 8)
    async with (
        Upstream() as upstream,
        ScriptedMilter({"eom": Answer(*pieces, CONTINUE)}) as milter,
        serving(upstream, asks(milter, timeout="60s")) as gateway,
        connected(gateway) as client,
    ):
        await client.hello()
        assert await send(client) == ("end", QUEUED)
    ((message),) = upstream.messages
    assert message.endswith(body) and message.count(b"\r\n") == 3 + 800 * len(pieces)

"""reverse_dns's name server is silent, lies, fails or is gone: the session goes on, and the name is for later."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import pytest

from gateway import Kind, Session, Stage
from gateway.testing.gateway import free_port, running
from tests.fault.baseline import unchanged
from tests.fault.client import connected
from tests.fault.upstream import EHLO, Upstream
from tests.interop.conftest import Records
from tests.peers.dns import DnsServer, Entry

pytestmark = pytest.mark.anyio

ADDRESS = "1.0.0.127.in-addr.arpa"
POINTER = {"PTR": ["client.test."]}


class Seen(Stage):
    """Keeps what the stages before it found out."""

    kind = Kind.PLUMBING
    status = name = ""

    def greeting(self, session: Session) -> None:
        self.status, self.name = session.client.name_status, session.client.name


async def answered(resolver: str, wait: str = "200ms") -> tuple[str, str, list[bytes]]:
    """A whole message behind this name server: status and name of its client, and the XCLIENT lines it led to."""
    async with Upstream(ehlo=[*EHLO, "XCLIENT NAME ADDR PORT PROTO HELO LOGIN"]) as upstream:
        pipeline: dict[str, object] = {
            "resolvers": [resolver],
            "stages": [{"reverse_dns": wait}, "seen", "xclient", {"splice": {"handoff": "never"}}],
            "upstreams": upstream.pool(),
        }
        async with asyncio.timeout(10), running(pipeline, stages={"seen": Seen}) as gateway:
            async with unchanged(gateway), connected(gateway) as client:
                await client.envelope("DATA")
                assert await client.say("Subject: x\r\n\r\nhello\r\n.") == "250 2.0.0 queued\r\n"
                assert await client.say("QUIT") == "221 2.0.0 Bye\r\n"
            (seen,) = (stage for stage in gateway.pipeline.plan.chain.stages if isinstance(stage, Seen))
        return seen.status, seen.name, [line for line in upstream.commands if line.startswith(b"XCLIENT")]


FAULTS: dict[str, Mapping[str, Entry]] = {
    **{
        do: {ADDRESS: {"do": do}}
        for do in ("silent", "garbage", "half", "servfail", "refused", "wrongid", "wrongname", "torn")
    },
    **{f"{do} for the name": {ADDRESS: POINTER, "client.test": {"do": do}} for do in ("silent", "servfail", "garbage")},
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_name_server_that_fails_costs_a_moment_and_the_name(fault: str, records: Records) -> None:
    async with DnsServer(FAULTS[fault]) as server:
        status, name, said = await answered(f"{server.address[0]}:{server.address[1]}")
        assert server.asked
    assert (status, name) == ("tempunavail", "")
    (line,) = said
    assert b" NAME=[TEMPUNAVAIL]" in line and b" ADDR=127.0.0.1" in line
    assert records.all("stage_failure") == records.all("internal_error") == []


async def test_no_name_server(records: Records) -> None:
    status, name, (line,) = await answered(f"127.0.0.1:{free_port()}")
    assert (status, name) == ("tempunavail", "")
    assert b" NAME=[TEMPUNAVAIL]" in line


SOUND: Sequence[tuple[Mapping[str, Entry], str, str, bytes]] = [
    ({ADDRESS: POINTER, "client.test": {"A": ["127.0.0.1"]}}, "ok", "client.test", b" NAME=client.test"),
    ({ADDRESS: POINTER, "client.test": {"A": ["192.0.2.1"]}}, "unavailable", "", b" NAME=[UNAVAILABLE]"),
    ({}, "unavailable", "", b" NAME=[UNAVAILABLE]"),
    (
        {ADDRESS: {"do": "spoof", **POINTER}, "client.test": {"do": "spoof", "A": ["127.0.0.1"]}},
        "ok", "client.test", b" NAME=client.test",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("zone", "status", "name", "word"), SOUND, ids=["ok", "elsewhere", "none", "spoofed"])
async def test_what_a_sound_name_server_says_is_kept_apart(
    zone: Mapping[str, Entry], status: str, name: str, word: bytes
) -> None:
    async with DnsServer(zone) as server:
        found, verified, (line,) = await answered(f"{server.address[0]}:{server.address[1]}", "5s")
    assert (found, verified) == (status, name)
    assert word in line


async def test_a_client_that_leaves_while_its_name_is_looked_up(records: Records) -> None:
    async with Upstream() as upstream, DnsServer({ADDRESS: {"do": "silent"}}) as server:
        pipeline: dict[str, object] = {
            "relay": "open",
            "resolvers": [f"{server.address[0]}:{server.address[1]}"],
            "stages": [{"reverse_dns": "30s"}, "splice"],
            "upstreams": upstream.pool(),
        }
        async with running(pipeline) as gateway, unchanged(gateway), connected(gateway) as client, asyncio.timeout(10):
            await server.wait_asked(1)
            client.leave("reset")
            await gateway.idle()
    assert records.one("session")["reason"] == "client reset"

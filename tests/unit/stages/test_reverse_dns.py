"""The client's name: verified, unverified, missing, or not to be had."""

from __future__ import annotations

import pytest

from gateway.dns.resolver import ReverseName
from gateway.testing.stages import FakeResolver, FakeWorker, build, make_session
from stages.reverse_dns import ReverseDns

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("found", "name", "reverse_name", "status"),
    [
        ("client.example", "client.example", "client.example", "ok"),
        (ReverseName(None, "liar.example", "unavailable"), "", "liar.example", "unavailable"),
        (ReverseName(None, "slow.example", "tempunavail"), "", "slow.example", "tempunavail"),
        (ReverseName(None, None, "tempunavail"), "", "", "tempunavail"),
        (None, "", "", "unavailable"),
    ],
)
async def test_what_dns_says_becomes_the_client_facts(
    found: str | ReverseName | None, name: str, reverse_name: str, status: str
) -> None:
    stage = build(ReverseDns)
    await stage.start(FakeWorker(resolver=FakeResolver({"192.0.2.1": found} if found else {})))
    session = make_session()
    await stage.connect(session)
    client = session.client
    assert (client.name, client.reverse_name, client.name_status) == (name, reverse_name, status)


async def test_a_silent_name_server_costs_the_wait_and_no_more() -> None:
    stage = build(ReverseDns, "1ms")
    await stage.start(FakeWorker(resolver=FakeResolver(silent=True)))
    session = make_session()
    await stage.connect(session)
    assert (session.client.name, session.client.name_status) == ("", "tempunavail")


@pytest.mark.parametrize("address", ["", "unix:", "/run/client.sock"])
async def test_a_local_socket_has_no_name_and_nobody_is_asked(address: str) -> None:
    stage, resolver = build(ReverseDns), FakeResolver()
    await stage.start(FakeWorker(resolver=resolver))
    session = make_session(address=address)
    await stage.connect(session)
    assert session.client.name_status == "tempunavail"
    assert resolver.asked == []


def test_it_provides_what_conditions_may_read() -> None:
    assert ReverseDns.provides == {"client.name", "client.reverse_name", "client.name_status"}

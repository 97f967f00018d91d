"""Whom a pipeline may never ban: the networks of its `trust`, and its upstream servers."""

from __future__ import annotations

import asyncio
from ipaddress import ip_network
from types import SimpleNamespace

import pytest

from gateway.frontend.served import Networks
from gateway.service.worker import StageWorker
from gateway.state.memory import MemoryStore
from gateway.upstream.pool import Pool, Pools, PoolSettings

pytestmark = pytest.mark.anyio


def stage_worker(*servers: str) -> StageWorker:
    loop = asyncio.get_running_loop()
    plan = SimpleNamespace(
        name="test", hostname="gateway.example", resolvers=[],
        resolver=SimpleNamespace(timeout=1.0, valid=None, ipv4=True, ipv6=True),
        trust_clients=Networks([ip_network("10.0.0.0/8")]),
        trust_xclient=Networks([ip_network("192.0.2.1/32")]),
        trust_proxy=Networks([ip_network("2001:db8::/32")]),
    )  # fmt: skip
    worker = StageWorker(plan, MemoryStore(loop.time), loop)  # type: ignore[arg-type]
    pools = {f"pool{number}": Pool(f"pool{number}", PoolSettings(((url, 1),))) for number, url in enumerate(servers)}
    worker.pools = Pools(pools)
    return worker


@pytest.mark.parametrize(
    ("address", "trusted"),
    [
        ("10.9.8.7", True),
        ("192.0.2.1", True),
        ("2001:db8::9", True),
        ("198.51.100.1", True),
        ("2001:DB9:0::1", True),  # as a PROXY header may write it
        ("203.0.113.5", True),
        ("198.51.100.2", False),
        ("", False),
        ("unix:", False),
    ],
)
async def test_trusts(address: str, trusted: bool) -> None:
    worker = stage_worker("smtp://198.51.100.1:25", "imap://[2001:db9::1]:143", "lmtp+unix:/run/lmtp")
    worker.pools.server("203.0.113.5:25")  # named by an auth server
    assert worker.trusts(address) is trusted


async def test_names_are_looked_up_without_waiting() -> None:
    worker = stage_worker("smtp://localhost")
    assert not worker.trusts("127.0.0.1"), "nobody looked yet"
    server = worker.pools["pool0"].servers[0]
    assert server._lookup is not None, "now somebody does"
    await server._lookup
    assert worker.trusts("127.0.0.1") and not worker.trusts("127.0.0.2")

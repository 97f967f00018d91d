"""Limits, places and bans over all workers of a host (lmdb) and over several gateways behind HAProxy (redis): exact.

With GATEWAY_SOAK=1 the limit is 100/minute for three minutes, else 100 in five seconds for twelve seconds.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NamedTuple, cast

import pytest

from gateway.state.memory import MemoryStore
from gateway.state.store import Window
from tests.fault.client import Client
from tests.fault.service import Service, service
from tests.peers.haproxy import HAProxy
from tests.peers.process import free_port, scratch
from tests.peers.redis import RedisServer

pytestmark = [pytest.mark.peers, pytest.mark.anyio]

SOAK = os.environ.get("GATEWAY_SOAK") == "1"
WINDOW, SECONDS = (Window(100, 60.0), 180.0) if SOAK else (Window(100, 5.0), 12.0)
RATE = f"{WINDOW.limit}/{WINDOW.period:g}s"
CLIENTS = 8
FROM_PROXY = "127.0.0.9"  # checks come from HAProxy's own address and count for that
SINK = {"sink": {"servers": ["embedded://mail"]}}
PATIENT = {"errors": 10_000_000, "junk_commands": 10_000_000, "transactions": 10_000_000}
QUIET = {"level": "warning"}
MAIL = "MAIL FROM:<a@example.org>"


class Hit(NamedTuple):
    """One thing that is counted: when (seconds since 1970), and whether it was allowed."""

    at: float
    allowed: bool


def one_counter(hits: Sequence[Hit]) -> int:
    """How many of these hits one counter in memory allows."""
    now = 0.0
    store = MemoryStore(lambda: now)
    allowed = 0
    for hit in sorted(hits):
        now = hit.at
        allowed += store.hit_now("all", [WINDOW]).allowed
    return allowed


def check(hits: Sequence[Hit], what: str) -> None:
    """Within one percent."""
    allowed, expected = sum(hit.allowed for hit in hits), one_counter(hits)
    said = f"{what}: {len(hits)} hits at {RATE} in {SECONDS:g} s: {allowed} allowed, one counter allows {expected}"
    print(said)
    assert len(hits) > 5 * expected, said  # it was hammered on
    assert abs(allowed - expected) <= expected / 100, said


async def hammer(
    one: Callable[[float, list[Hit]], Awaitable[None]], in_the_middle: Callable[[], Awaitable[None]]
) -> list[Hit]:
    """`one(until, hits)` for each client, all at the same time, and something else when half of it is over."""
    hits: list[Hit] = []
    begun = time.time()
    clients = asyncio.gather(*(one(begun + SECONDS, hits) for _ in range(CLIENTS)))

    await asyncio.sleep(SECONDS / 2)
    await in_the_middle()
    await clients
    return hits


@pytest.mark.timeout(SECONDS + 100)
async def test_one_limit_over_two_workers(tmp_path: Path) -> None:
    """Messages of 8 clients; a reload in the middle forgets nothing."""
    pipeline = {
        "stages": [{"rate_limit": {"count": "messages", "limit": RATE}}, {"splice": {"handoff": "never"}}],
        "upstreams": SINK,
        "limits": PATIENT,
    }
    async with service(tmp_path, pipeline, workers=2, store="lmdb", log=QUIET) as running:

        async def one(until: float, hits: list[Hit]) -> None:
            while time.time() < until:
                client = await running.client()
                for _ in range(100):  # then another connection, so that both workers get their share
                    begun = time.time()
                    reply = await client.say(MAIL)
                    if reply.startswith("421 4.3.2") or begun > until:  # the reload: it was not counted
                        break
                    assert reply[:3] in ("250", "450"), reply
                    hits.append(Hit((begun + time.time()) / 2, reply.startswith("250")))
                    if reply.startswith("250") and not (await client.say("RSET")).startswith("250"):
                        break
                client.writer.close()

        async def in_the_middle() -> None:
            while {row["worker"] for row in await sessions(running)} != {0, 1}:
                pass
            status, said = await running.ctl("reload")
            assert status == 0, said

        check(await hammer(one, in_the_middle), "two workers, lmdb")
        assert not running.all("store_down")


@pytest.mark.timeout(SECONDS + 100)
async def test_one_limit_over_three_gateways(tmp_path: Path, redis: RedisServer) -> None:
    """Connections of 8 clients through HAProxy, whose address the gateways learn from PROXY v2."""
    ports = [free_port() for _ in range(3)]
    async with AsyncExitStack() as stack:
        gateways = []
        for number, port in enumerate(ports):
            folder = tmp_path / str(number)
            folder.mkdir()
            pipeline = {
                "listen": [{"url": f"smtp://127.0.0.1:{port}", "proxy_protocol": "required"}],
                "trust": {"proxy": ["127.0.0.1"]},
                "stages": [{"rate_limit": {"count": "connections", "limit": RATE, "exempt": ["127.0.0.1"]}}, "splice"],
                "upstreams": SINK,
            }
            opened = service(folder, pipeline, store=at(redis), log=QUIET)
            gateways.append(await stack.enter_async_context(opened))
        servers = {f"g{number}": port for number, port in enumerate(ports)}
        proxy = HAProxy(tmp_path, servers)
        stack.callback(proxy.stop)
        await asyncio.to_thread(proxy.start)

        async def one(until: float, hits: list[Hit]) -> None:
            while (begun := time.time()) < until:
                reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port, local_addr=(FROM_PROXY, 0))
                greeting = await reader.readline()
                assert greeting[:3] in (b"220", b"421"), greeting
                hits.append(Hit((begun + time.time()) / 2, greeting.startswith(b"220")))
                writer.close()

        async def in_the_middle() -> None:
            status, said = await gateways[0].ctl("reload")
            assert status == 0, said

        hits = await hammer(one, in_the_middle)
        shares = proxy.sessions()
        check(hits, f"three gateways, redis, {shares}")
        assert sum(shares.values()) == len(hits) and min(shares.values()) > len(hits) / 5
        keys = [str(row["key"]) for row in await limits(gateways[1])]
        assert keys == [f"rate:pipeline:rate_limit:{FROM_PROXY}"]


# -- both stores


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with scratch() as folder, RedisServer(folder) as running:
        yield running


def at(server: RedisServer) -> str:
    """As `process.store` has it."""
    return f"unix://{server.path}"


@pytest.fixture(params=["lmdb", "redis"])
def store(request: pytest.FixtureRequest) -> str:
    """`process.store`."""
    return "lmdb" if request.param == "lmdb" else at(request.getfixturevalue("redis"))


async def sessions(running: Service) -> list[dict[str, object]]:
    return cast("dict[str, list[dict[str, object]]]", await running.ask("sessions"))["sessions"]


async def limits(running: Service) -> list[dict[str, object]]:
    return cast("dict[str, list[dict[str, object]]]", await running.ask("limits", "show"))["limits"]


async def bans(running: Service) -> list[dict[str, object]]:
    return cast("dict[str, list[dict[str, object]]]", await running.ask("bans", "list"))["bans"]


async def knock(running: Service) -> Client | None:
    """One more client, None if it is refused."""
    client = Client(*await asyncio.open_connection("127.0.0.1", running.port))
    greeting = await client.reply()
    if greeting.startswith("220"):
        return client
    assert greeting.startswith("421 4.7.0"), greeting
    client.writer.close()
    return None


async def lives(client: Client) -> bool:
    """Whether its session goes on."""
    try:
        return (await client.say("NOOP")).startswith("250")
    except ConnectionError:
        return False


async def test_places_of_a_killed_worker_are_free_again(tmp_path: Path, store: str) -> None:
    """Those of the others are not: the limit is reached with exactly as many new clients as were lost."""
    pipeline = {"stages": [{"connection_limit": {"per_client": 6}}, "splice"], "upstreams": SINK}
    async with service(tmp_path, pipeline, workers=2, store=store) as running:
        clients = [await running.client() for _ in range(6)]
        assert await knock(running) is None
        assert [row["count"] for row in await limits(running)] == [6]
        os.kill(running.workers()[0], signal.SIGKILL)
        await running.record("worker_died")
        killed = time.monotonic()
        living = [client for client in clients if await lives(client)]
        assert 0 < len(living) < 6
        async with asyncio.timeout(30):
            while len(living) < 6:
                client = await knock(running)
                if client is not None:
                    living.append(client)
                else:
                    await asyncio.sleep(0.02)
        print(f"{store.partition(':')[0]}: right again after {time.monotonic() - killed:.2f} s")
        assert await knock(running) is None
        assert [row["count"] for row in await limits(running)] == [6]


async def test_counts_outlive_a_reload_and_an_operator_clears_them(tmp_path: Path, store: str) -> None:
    stages = [{"rate_limit": {"count": "messages", "limit": "5/1h"}}, "splice"]
    async with service(tmp_path, {"stages": stages, "upstreams": SINK}, workers=2, store=store) as running:

        async def replies(count: int) -> list[str]:
            clients = [await running.client() for _ in range(count)]
            found = [(await client.say(MAIL))[:3] for client in clients]
            for client in clients:
                client.writer.close()
            return found

        assert await replies(7) == ["250"] * 5 + ["450"] * 2
        await running.reload()
        await running.record("generation_ended")
        assert await replies(4) == ["450"] * 4
        (row,) = await limits(running)
        assert (row["kind"], row["count"]) == ("rate", 5)
        assert (await running.ctl("limits", "clear", str(row["key"])))[0] == 0
        assert await limits(running) == []
        assert (await running.ctl("limits", "clear", str(row["key"])))[0] != 0
        assert await replies(6) == ["250"] * 5 + ["450"]


async def test_a_ban_holds_in_every_worker(tmp_path: Path, store: str) -> None:
    """Who fails in one worker is refused by both, until an operator lifts it; what an operator adds, too."""
    stages = [{"ban": {"limit": "6/10m"}}, "splice"]
    async with service(tmp_path, {"stages": stages, "upstreams": SINK}, workers=2, store=store) as running:

        async def let_in() -> int:
            """Of 20 clients, which both workers get."""
            found = [client for client in [await knock(running) for _ in range(20)] if client is not None]
            if found:
                assert {row["worker"] for row in await sessions(running)} == {0, 1}
            for client in found:
                client.writer.close()
            return len(found)

        assert await let_in() == 20 and await bans(running) == []
        client = await running.client()
        for _ in range(3):
            assert (await client.say("NONSENSE")).startswith("50")
        await running.record("banned")
        assert await let_in() == 0
        assert await lives(client)  # open sessions go on
        (ban,) = await bans(running)
        assert (ban["network"], ban["level"], ban["by"]) == ("127.0.0.1", 1, "stage")
        await running.reload()
        assert await let_in() == 0
        assert (await running.ctl("bans", "remove", "127.0.0.1"))[0] == 0
        assert await bans(running) == [] and await let_in() == 20
        status, said = await running.ctl("bans", "add", "127.0.0.1", "--for", "1h", "--reason", "by hand")
        assert status == 0, said
        (ban,) = await bans(running)
        assert (ban["network"], ban["reason"], ban["by"]) == ("127.0.0.1", "by hand", "ctl")
        assert await let_in() == 0
        status, _ = await running.ctl("bans", "remove", "192.0.2.1")
        assert status != 0
        assert await let_in() == 0

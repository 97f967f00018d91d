from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from gateway.observe import metrics
from gateway.observe.counters import CounterMap
from gateway.protocol.smtp import Ehlo
from gateway.session import Session
from gateway.upstream.pool import News, Pool, PoolDown, PoolSettings
from gateway.upstream.probe import Health, learn, probe_server
from gateway.upstream.server import Server
from gateway.upstream.smtp import UpstreamError, quits_done

pytestmark = pytest.mark.anyio

EHLO = "C: EHLO gw.example\nS: 250-mx.example\nS: 250 SIZE 1000"
QUIT = "\nC: QUIT\nS: 221 bye"
GOOD = "S: 220 mx.example\n" + EHLO + QUIT
DEAD = "close"
Peers = Callable[..., Awaitable[Any]]


@pytest.fixture(autouse=True)
def a_row_of_its_own() -> Iterator[None]:
    metrics.bind(CounterMap.private().row(0), None)
    yield
    metrics.bind(CounterMap.private().row(0), None)


@pytest.fixture(autouse=True)
async def all_quits_are_done() -> AsyncIterator[None]:
    yield
    await quits_done()


async def test_a_probe_speaks_smtp_and_says_quit(peers: Peers) -> None:
    peer = await peers(GOOD)
    profile = await probe_server(Server(peer.url), PoolSettings(), hostname="gw.example")
    assert (profile.greeting.code, profile.ehlo.keywords, profile.tls) == (220, {"SIZE": "1000"}, None)
    await asyncio.wait_for(peer.gone.wait(), 5)


async def test_a_probe_of_servers_that_expect_a_proxy_header_says_local(peers: Peers) -> None:
    peer = await peers("read 16\n" + GOOD)
    await probe_server(Server(peer.url), PoolSettings(), hostname="gw.example", proxy_header=True)
    await asyncio.wait_for(peer.gone.wait(), 5)


async def test_an_lmtp_server_is_asked_with_lhlo(peers: Peers, ca_file: str) -> None:
    """Again after STARTTLS."""
    lhlo = EHLO.replace("EHLO", "LHLO")
    peer = await peers("S: 220 mx\nC: LHLO gw.example\nS: 250-mx\nS: 250 STARTTLS\nC: STARTTLS\nS: 220 go\ntls\n" + lhlo
                       + QUIT)  # fmt: skip
    settings = PoolSettings(tls="required", ca_file=ca_file)
    profile = await probe_server(Server(peer.url.replace("smtp:", "lmtp:")), settings, hostname="gw.example")
    assert profile.ehlo.keywords == {"SIZE": "1000"}
    await asyncio.wait_for(peer.gone.wait(), 5)


async def test_a_probe_goes_behind_tls(peers: Peers, ca_file: str) -> None:
    peer = await peers(
        "S: 220 mx\nC: EHLO gw.example\nS: 250-mx\nS: 250 STARTTLS\nC: STARTTLS\nS: 220 go\ntls\n" + EHLO + QUIT
    )
    settings = PoolSettings(tls="required", ca_file=ca_file)
    profile = await probe_server(Server(peer.url), settings, hostname="gw.example")
    assert profile.tls is not None and profile.tls.verified
    assert profile.ehlo.keywords == {"SIZE": "1000"}


@pytest.mark.parametrize(
    ("dialogue", "kind"),
    [(DEAD, "lost"), ("S: 421 busy\nhang", "busy"), ("S: 554 no" + QUIT, "down"), ("hang", "timeout")],
)
async def test_probes_that_fail(peers: Peers, dialogue: str, kind: str) -> None:
    peer = await peers(dialogue)
    timeout = 0.1 if kind == "timeout" else 9.0
    with pytest.raises(UpstreamError) as caught:
        await probe_server(Server(peer.url), PoolSettings(), hostname="gw.example", timeout=timeout)
    assert caught.value.kind == kind


class Steps:
    """In place of sleep: each probe waits until the test takes a step, and says how long it would have slept."""

    def __init__(self) -> None:
        self.slept: list[float] = []
        self._asleep = asyncio.Event()
        self._go = asyncio.Semaphore(0)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self._asleep.set()
        await self._go.acquire()

    async def step(self) -> float:
        """One probe; the pause behind it."""
        await self._asleep.wait()
        self._asleep.clear()
        self._go.release()
        await asyncio.wait_for(self._asleep.wait(), 5)
        return self.slept[-1]


def about(seconds: float) -> Any:
    return pytest.approx(seconds, rel=0.21)


async def test_health_takes_out_and_brings_back(peers: Peers, new_session: Callable[..., Session]) -> None:
    peer = await peers(DEAD, DEAD, DEAD, DEAD, DEAD, GOOD, "S: 421 busy\nhang", GOOD, DEAD, GOOD)
    pool = Pool("mta", PoolSettings(servers=((peer.url, 1),)))
    (server,) = pool.servers
    pool.learned(server, Ehlo("mx", {"SIZE": "10"}))
    steps = Steps()
    health = Health(pool, hostname="gw.example", interval=30, sleep=steps.sleep)
    health.start()
    try:
        assert [await steps.step(), server.down] == [about(1), False]
        assert [await steps.step(), server.down] == [about(2), False]
        assert [await steps.step(), server.down] == [about(4), True]
        with pytest.raises(PoolDown):
            await pool.acquire(new_session())
        assert [await steps.step(), server.down] == [about(8), True]
        assert [await steps.step(), server.down] == [about(16), True]
        assert [await steps.step(), server.down] == [about(1), True], "one success is not enough"
        assert [await steps.step(), server.down] == [about(30), False], "busy is alive"
        assert (await pool.acquire(new_session())) is server
        assert pool.profile() == {"SIZE": "1000"}
        assert await steps.step() == about(30)
        assert [await steps.step(), server.down] == [about(1), False]
        assert await steps.step() == about(30)
    finally:
        await health.stop()


async def test_a_probe_ends_a_passive_ejection(peers: Peers) -> None:
    good = await peers(GOOD)
    pool = Pool("mta", PoolSettings(servers=((good.url, 1), (good.url, 1))), clock=lambda: 0.0)
    pool.failed(pool.servers[0], "x")
    assert not pool.servers[0].available(0.0)
    health = Health(pool, hostname="gw.example")
    assert await learn(health, 5.0)
    assert pool.servers[0].available(0.0)


async def test_learn_knows_what_one_server_says_while_another_is_down(peers: Peers, closed_port: str) -> None:
    pool = Pool("mta", PoolSettings(servers=((closed_port, 1), ((await peers(GOOD)).url, 1))))
    assert await learn(Health(pool, hostname="gw.example"), 5.0)
    assert pool.profile() == {"SIZE": "1000"}


async def test_sessions_that_want_to_know_share_one_probe(peers: Peers) -> None:
    peer = await peers(DEAD)
    pool = Pool("mta", PoolSettings(servers=((peer.url, 1),)))
    assert not await pool.learn(), "nobody asks yet"
    health = Health(pool, hostname="gw.example")
    assert await asyncio.gather(*(pool.learn() for _ in range(5))) == [False] * 5
    assert not await pool.learn(), "asked a moment ago"
    assert peer.connections == 1
    await health.stop()


async def test_a_pool_that_is_known_is_not_asked(closed_port: str) -> None:
    pool = Pool("mta", PoolSettings(servers=((closed_port, 1),), assume=("DSN",)))
    assert await pool.learn()


async def test_stop_ends_probes_under_way(peers: Peers) -> None:
    peer = await peers("hang")
    pool = Pool("mta", PoolSettings(servers=((peer.url, 1),)))

    async def at_once(seconds: float) -> None:
        await asyncio.sleep(0)

    health = Health(pool, hostname="gw.example", sleep=at_once)
    health.start()
    await peer.arrived.wait()
    await health.stop()
    await asyncio.wait_for(peer.gone.wait(), 5)


async def test_while_nothing_is_known_servers_are_asked_every_second(peers: Peers) -> None:
    peer = await peers(DEAD, DEAD, DEAD, DEAD, GOOD)
    pool = Pool("mta", PoolSettings(servers=((peer.url, 1),)))
    steps = Steps()
    health = Health(pool, hostname="gw.example", interval=30, sleep=steps.sleep)
    health.start()
    try:
        assert [await steps.step() for _ in range(4)] == [about(1)] * 4
        assert pool.profile() is None
        assert [await steps.step(), await steps.step()] == [about(1), about(30)]
        assert pool.profile() == {"SIZE": "1000"}
    finally:
        await health.stop()


async def test_who_was_not_well_at_the_start_is_asked_again_soon(peers: Peers) -> None:
    good, bad = await peers(GOOD), await peers(DEAD)
    pool = Pool("mta", PoolSettings(servers=((bad.url, 1), (good.url, 1))))
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await asyncio.Event().wait()

    health = Health(pool, hostname="gw.example", interval=30, sleep=sleep)
    assert await learn(health, 5.0)
    health.start()
    await asyncio.sleep(0)
    assert pauses == [about(1), about(30)]
    await health.stop()


async def test_one_worker_probes_and_all_see(peers: Peers) -> None:
    """The other one takes over later. Only who probes says in the metrics what is up."""
    block = CounterMap.create(2)
    peer = await peers(DEAD, DEAD, DEAD, GOOD, GOOD, DEAD, DEAD, DEAD)
    settings = PoolSettings(servers=((peer.url, 1),))
    workers = []
    for row in range(2):
        metrics.bind(block.row(row), block)
        pool = Pool("mta", settings)
        steps = Steps()
        workers.append((pool, steps, Health(pool, hostname="gw.example", interval=30, sleep=steps.sleep)))
    (prober, steps, health), (other, later, idle) = workers
    news: list[object] = []

    def tell(message: News) -> None:
        news.append(message)
        other.apply(json.loads(json.dumps(message)))

    prober.news = tell

    def up(row: int) -> int:
        found = block.row(row).find(f'gateway_upstream_up{{pipeline="",pool="mta",server="{peer.url}"}}')
        return 0 if found is None else found.value

    try:
        metrics.bind(block.row(0), block)
        health.start(True)
        idle.start(False)
        assert (up(0), up(1)) == (1, 0)
        for _ in range(3):
            await steps.step()
        assert other.servers[0].down and other.describe()["servers"][0]["state"] == "down"  # type: ignore
        assert other.servers[0].last_error and up(0) == 0
        for _ in range(2):
            await steps.step()
        assert not other.servers[0].down and other.profile() == {"SIZE": "1000"}
        assert other.servers[0].latency is not None and up(0) == 1 and len(news) == 5
        checks = f'gateway_upstream_checks_total{{pipeline="",pool="mta",server="{peer.url}",result='
        assert [block.total(checks + end) for end in ('"ok"}', '"failed"}')] == [2, 3]

        await health.stop()
        assert up(0) == 0
        metrics.bind(block.row(1), block)
        idle.start(True)
        assert up(1) == 1
        for _ in range(3):
            await later.step()
        assert other.servers[0].down and up(1) == 0
        idle.start(False)
        assert not other.probing
    finally:
        await health.stop()
        await idle.stop()


async def test_a_worker_that_does_not_probe_leaves_it_to_the_other_whether_a_server_is_down(peers: Peers) -> None:
    pool = Pool("mta", PoolSettings(servers=(((await peers(GOOD)).url, 1),)))
    pool.apply({"kind": "check", "url": pool.servers[0].url, "down": True, "error": "no route", "seconds": 0.1})
    health = Health(pool, hostname="gw.example")
    assert await learn(health, 5.0)
    assert pool.servers[0].down and pool.profile() == {"SIZE": "1000"}
    await health.stop()

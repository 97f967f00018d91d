"""max_connections, the line and connections kept for reuse over several workers that share their counters."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Semaphore
from typing import Any

import pytest

from gateway.observe import metrics
from gateway.observe.counters import CounterMap
from gateway.session import Session
from gateway.upstream.pool import News, Pool, PoolBusy, Pools, PoolSettings
from gateway.upstream.server import Server

NewSession = Callable[..., Session]
A, B = "smtp://10.0.0.1:25", "smtp://10.0.0.2:25"
forked = multiprocessing.get_context("fork")


@pytest.fixture
def block() -> Iterator[CounterMap]:
    """Shared counters; afterwards the process has a row of its own again."""
    block = CounterMap.create(4)
    yield block
    metrics.bind(CounterMap.private().row(0), None)
    os.close(block.fd)


def worker(block: CounterMap, row: int, *urls: str, **settings: Any) -> Pool:
    """The pool of the worker that has this row."""
    metrics.bind(block.row(row), block)
    return Pool("mta", PoolSettings(servers=tuple((url, 1) for url in urls or (A,)), **settings), pipeline="mx")


def gauge(block: CounterMap, name: str, url: str = A) -> int:
    return block.total(f'gateway_upstream_{name}{{pipeline="mx",pool="mta",server="{url}"}}')


def waiting(block: CounterMap) -> int:
    return block.total('gateway_upstream_waiting{pipeline="mx",pool="mta"}')


def _hold(block: CounterMap, row: int, limit: int, free: Semaphore, answer: Connection) -> None:
    """Takes up to two places, keeps them a while; `free` has as many as there are: one too many finds none there."""
    pool = worker(block, row, max_connections=limit)
    (server,) = pool.servers
    taken = exceeded = held = 0
    for turn in range(20_000):
        if held < 2 and server.places.take(limit):
            if free.acquire(block=False):
                taken, held = taken + 1, held + 1
            else:
                exceeded += 1
        elif held and turn % 3 == 0:
            free.release()
            server.places.free()
            held -= 1
    for _ in range(held):
        free.release()
        server.places.free()
    answer.send((taken, exceeded))


@pytest.mark.parametrize("limit", [1, 3])
def test_workers_never_have_more_connections_than_the_limit(limit: int, block: CounterMap) -> None:
    free = forked.Semaphore(limit)
    children = []
    for row in range(3):
        ours, theirs = forked.Pipe(duplex=False)
        child = forked.Process(target=_hold, args=(block, row, limit, free, theirs))
        child.start()
        children.append((child, ours))
    results = [ours.recv() for _, ours in children]
    for child, _ in children:
        child.join()
    assert sum(exceeded for _, exceeded in results) == 0
    assert sum(taken for taken, _ in results) > 100
    assert gauge(block, "connections") == 0


def _occupy(block: CounterMap, session: Session, pipe: Connection) -> None:
    """Another worker: takes a place, gives it back when it is told to."""

    async def run() -> None:
        pool = worker(block, 1, max_connections=1)
        server = await pool.acquire(session)
        pipe.send("taken")
        pipe.recv()
        pool.release(server)

    asyncio.run(run())


@pytest.mark.parametrize("way", ["released", "killed"])
def test_a_place_that_another_process_frees_is_noticed(way: str, block: CounterMap, new_session: NewSession) -> None:
    ours, theirs = forked.Pipe()
    child = forked.Process(target=_occupy, args=(block, new_session(), theirs))
    child.start()
    assert ours.recv() == "taken"

    async def run() -> Server:
        pool = worker(block, 0, max_connections=1)
        place = asyncio.ensure_future(pool.acquire(new_session()))
        await asyncio.sleep(0)
        assert not place.done() and pool.describe()["waiting"] == waiting(block) == 1
        if way == "killed":
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            assert not place.done()
            block.row(1).clear_gauges()  # as its parent does
        else:
            ours.send("go")
        return await asyncio.wait_for(place, 5)

    assert asyncio.run(run()).url == A
    child.join()
    assert gauge(block, "connections") == 1 and waiting(block) == 0


@pytest.mark.anyio
async def test_the_queue_is_one_over_all_workers(block: CounterMap, new_session: NewSession) -> None:
    one, other = (worker(block, row, max_connections=1, queue=2) for row in range(2))
    server = await one.acquire(new_session())
    lines = [asyncio.ensure_future(pool.acquire(new_session())) for pool in (one, other)]
    await asyncio.sleep(0)
    with pytest.raises(PoolBusy, match="2 sessions wait already"):
        await other.acquire(new_session())
    lines[0].cancel()
    await asyncio.wait([lines[0]])
    one.release(server)
    assert (await asyncio.wait_for(lines[1], 5)).url == A


@pytest.mark.anyio
async def test_a_full_server_of_another_worker_is_passed_over(block: CounterMap, new_session: NewSession) -> None:
    one, other = (worker(block, row, A, B, max_connections=2) for row in range(2))
    for _ in range(2):
        await one.acquire(new_session(), {one.servers[1]})
    assert [(await other.acquire(new_session())).url for _ in range(2)] == [B, B]
    described: Any = other.describe()
    assert [(server["active"], server["total"]) for server in described["servers"]] == [(0, 2), (2, 2)]


@pytest.mark.anyio
async def test_a_worker_with_all_places_leaves_one_to_those_who_wait_elsewhere(
    block: CounterMap, new_session: NewSession
) -> None:
    """Its own line would get each place that it frees, and the other's none."""
    one, other = (worker(block, row, max_connections=2) for row in range(2))
    held = [await one.acquire(new_session()) for _ in range(2)]
    lines = {pool: asyncio.ensure_future(pool.acquire(new_session())) for pool in (one, other)}
    await asyncio.sleep(0)
    one.release(held[0])
    assert not lines[one].done()
    await asyncio.wait_for(lines[other], 5)
    assert not lines[one].done()
    one.release(held[1])
    await asyncio.wait_for(lines[one], 5)


class Kept:
    """A connection that was put aside."""

    def __init__(self) -> None:
        self.ended = False

    def stop_waiting(self) -> None:
        pass

    def end_quietly(self) -> None:
        self.ended = True


@pytest.mark.anyio
async def test_connections_kept_for_reuse_hold_places_until_they_are_needed(
    block: CounterMap, new_session: NewSession
) -> None:
    one, other = (worker(block, row, max_connections=2, reuse=True) for row in range(2))
    kept = [Kept(), Kept()]
    one.servers[0].idle.append(kept[0])  # type: ignore[arg-type]
    one.servers[0].idle.append(kept[1])  # type: ignore[arg-type]
    assert gauge(block, "idle_connections") == 2
    told: list[News] = []

    def tell(news: News) -> None:
        told.append(news)
        one.apply(news)

    other.news = tell
    assert (await asyncio.wait_for(other.acquire(new_session()), 5)).url == A
    assert [news["kind"] for news in told] == ["crowded"]
    assert [one.ended for one in kept] == [True, True] and gauge(block, "idle_connections") == 0


@pytest.mark.anyio
async def test_nothing_is_kept_for_reuse_while_others_wait(block: CounterMap, new_session: NewSession) -> None:
    one, other = (worker(block, row, max_connections=1, reuse=True) for row in range(2))
    server = await one.acquire(new_session())
    place = asyncio.ensure_future(other.acquire(new_session()))
    await asyncio.sleep(0)
    server.idle.append(Kept())  # type: ignore[arg-type]
    one.release(server)
    assert not server.idle
    assert (await asyncio.wait_for(place, 5)).url == A


@pytest.mark.anyio
async def test_who_keeps_connections_uses_one_and_closes_what_is_too_many(
    block: CounterMap, new_session: NewSession
) -> None:
    one, other = (worker(block, row, max_connections=2, reuse=True, queue=0) for row in range(2))
    kept = [Kept(), Kept()]
    for connection in kept:
        one.servers[0].idle.append(connection)  # type: ignore[arg-type]
    metrics.gauge("gateway_upstream_connections", pipeline="mx", pool="mta", server=A).add(1)  # somebody else's
    assert await one.acquire(new_session())
    assert [one.ended for one in kept] == [True, False], "1 + 1, and the one that is about to be used again"
    with pytest.raises(PoolBusy):
        await other.acquire(new_session())


@pytest.mark.anyio
async def test_servers_that_nobody_configured_count_in_each_worker_under_one_name(
    block: CounterMap, new_session: NewSession
) -> None:
    pools = []
    for row in range(2):
        metrics.bind(block.row(row), block)
        pools.append(Pools({}, dynamic=PoolSettings(max_connections=1, queue=0)))
    for url in ("10.9.9.1:25", "10.9.9.2:25"):
        for each in pools:
            await each.server(url).acquire(new_session())
            with pytest.raises(PoolBusy):
                await each.server(url).acquire(new_session())
    name = 'gateway_upstream_connections{pipeline="",pool="(dynamic)",server="(dynamic)"}'
    assert [block.total(sample) for sample in block.totals() if "upstream_connections" in sample] == [4]
    assert block.total(name) == 4


@pytest.mark.anyio
async def test_what_pools_count(new_session: NewSession, block: CounterMap) -> None:
    pool = worker(block, 0, A, B, max_connections=1, queue_timeout=0.001)
    pool.failed(pool.servers[0], "x")
    pool.failed(pool.servers[0], "x")
    server = await pool.acquire(new_session())
    with pytest.raises(PoolBusy):
        await pool.acquire(new_session())
    assert (gauge(block, "ejections_total"), gauge(block, "connections", B), waiting(block)) == (1, 1, 0)
    assert block.total('gateway_upstream_queue_timeouts_total{pipeline="mx",pool="mta"}') == 1
    pool.release(server)
    assert gauge(block, "connections", B) == 0

"""What the administrator does to servers, and how a pool describes itself; what workers tell each other."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from gateway.session import Session
from gateway.upstream.pool import News, Pool, PoolDown, PoolSettings

pytestmark = pytest.mark.anyio

NewSession = Callable[..., Session]
A, B, C = ("smtp://10.0.0.1:25", "smtp://10.0.0.2:25", "smtp://10.0.0.3:25")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def pool_of(*urls: str, clock: Clock | None = None, **settings: Any) -> Pool:
    return Pool("mta", PoolSettings(servers=tuple((url, 1) for url in urls), **settings), clock=clock or Clock())


async def shares(pool: Pool, sessions: list[Session]) -> Counter[str]:
    return Counter([(await pool.acquire(session)).url for session in sessions])


def workers(count: int, *urls: str) -> tuple[list[Pool], Clock, list[News]]:
    """Pools of as many workers that tell each other; what was told."""
    clock, told = Clock(), []
    pools = [pool_of(*urls, clock=clock, max_connections=10_000) for _ in range(count)]

    def teller(sender: Pool) -> Callable[[News], None]:
        def tell(news: News) -> None:
            told.append(news)
            for pool in pools:
                if pool is not sender:
                    pool.apply(json.loads(json.dumps(news)))

        return tell

    for pool in pools:
        pool.news = teller(pool)
    return pools, clock, told


def states(pool: Pool) -> list[object]:
    servers: Any = pool.describe()["servers"]
    return [server["state"] for server in servers]


async def test_a_drained_server_gets_no_new_sessions_and_keeps_its_own(new_session: NewSession) -> None:
    pool = pool_of(A, B, max_connections=100)
    assert await shares(pool, [new_session()] * 10) == {A: 5, B: 5}
    assert pool.administer("10.0.0.1", "drain")
    assert await shares(pool, [new_session()] * 10) == {B: 10}
    assert pool.servers[0].active == 5 and states(pool) == ["draining", "up"]
    pool.probed(pool.servers[0], "refused")
    assert states(pool) == ["down", "up"], "health checks go on"
    pool.probed(pool.servers[0], "")
    assert states(pool) == ["draining", "up"]
    pool.servers[0].ejected_until = float("-inf")
    assert pool.administer(A, "ready") and states(pool) == ["up", "up"]
    assert (await shares(pool, [new_session()] * 10))[A] == 5


async def test_all_drained_is_said_and_ready_serves_who_waits(new_session: NewSession) -> None:
    pool = pool_of(A, B, max_connections=1)
    held = [await pool.acquire(new_session()) for _ in range(2)]
    waiting = asyncio.ensure_future(pool.acquire(new_session()))
    await asyncio.sleep(0)
    pool.administer(A, "drain")
    assert not waiting.done()
    pool.administer(B, "weight", 0)
    with pytest.raises(PoolDown, match="drained by the administrator"):
        await waiting
    with pytest.raises(PoolDown, match="drained by the administrator"):
        await pool.acquire(new_session())
    pool.administer(A, "ready")
    waiting = asyncio.ensure_future(pool.acquire(new_session()))
    await asyncio.sleep(0)
    for server in held:
        pool.release(server)
    assert (await waiting).url == A


@pytest.mark.parametrize("balance", ["round_robin", "least_connections"])
async def test_a_weight_counts_from_the_next_session_on(balance: str, new_session: NewSession) -> None:
    pool = pool_of(A, B, balance=balance, max_connections=1000)
    pool.administer(A, "weight", 3)
    assert await shares(pool, [new_session()] * 40) == {A: 30, B: 10}
    assert pool.servers[0].configured_weight == 1


async def test_with_weight_0_and_back_a_hash_keeps_who_was_there(new_session: NewSession) -> None:
    pool = pool_of(A, B, C, balance="client", max_connections=10_000)
    sessions = [new_session(f"192.0.2.{n}") for n in range(200)]
    before = [(await pool.acquire(one)).url for one in sessions]
    pool.administer(A, "weight", 0)
    during = [(await pool.acquire(one)).url for one in sessions]
    assert A not in during and all(old == new for old, new in zip(before, during, strict=True) if old != A)
    pool.administer(A, "ready")
    assert states(pool)[0] == "draining", "ready is about drain, not about the weight"
    pool.administer(A, "weight", 1)
    assert [(await pool.acquire(one)).url for one in sessions] == before


@pytest.mark.parametrize("url", ["10.9.9.9:25", "nonsense://x", "smtps://10.0.0.1:465", ""])
def test_unknown_servers(url: str) -> None:
    assert not pool_of(A).administer(url, "drain")


@pytest.mark.parametrize(("action", "weight"), [("stop", None), ("weight", None), ("weight", -1), ("weight", 1001)])
def test_what_cannot_be_done(action: str, weight: int | None) -> None:
    with pytest.raises(ValueError):
        pool_of(A).administer(A, action, weight)


def test_what_the_administrator_did_is_known_to_workers_that_come_later() -> None:
    (first, second), _, told = workers(2, A, B)
    first.administer(A, "drain")
    first.administer(A, "weight", 7)
    assert states(second) == ["draining", "up"] and second.servers[0].weight == 7
    late = pool_of(A, B)
    late.apply(told[-1])
    assert states(late) == ["draining", "up"]
    first.administer(A, "ready")
    assert states(second) == ["up", "up"]


def test_an_ejection_is_told_once_and_so_is_the_return() -> None:
    (first, second, third), clock, told = workers(3, A, B)
    for _ in range(50):
        first.failed(first.servers[0], "connection refused")
        second.failed(second.servers[0], "connection refused")
    assert [news["kind"] for news in told] == ["ejection"]
    assert [states(pool)[0] for pool in (first, second, third)] == ["ejected"] * 3
    assert third.servers[0].last_error == "connection refused"
    clock.now += 1.0
    second.failed(second.servers[0], "again")
    assert third.servers[0].ejected_until == clock.now + 2.0, "all know that it was the second in a row"
    clock.now += 2.0
    assert states(first)[0] == "slow"
    for _ in range(50):
        third.succeeded(third.servers[0])
    assert [news["kind"] for news in told] == ["ejection"] * 3
    assert [pool.servers[0].failures for pool in (first, second, third)] == [0] * 3


def test_a_server_that_fails_and_succeeds_by_turns_is_told_of_once_a_second() -> None:
    (first, _), clock, told = workers(2, A, B)
    for _ in range(100):
        first.failed(first.servers[0], "x")
        first.succeeded(first.servers[0])
        clock.now += 0.01
    assert len(told) <= 4


def test_two_workers_together_eject_no_more_than_half() -> None:
    (first, second), _, _ = workers(2, A, B)
    first.news, news = None, first.news
    first.failed(first.servers[0], "x")
    second.failed(second.servers[1], "x")
    assert states(first) == ["ejected", "up"]
    assert news is not None
    second.apply({"kind": "ejection", "url": A, "until": 1030.0, "failures": 1, "error": "x"})
    assert states(second) == ["up", "ejected"]


def test_news_of_what_is_not_known_are_ignored() -> None:
    pool = pool_of(A)
    before = pool.describe()
    unknown: list[News] = [{}, {"kind": "check"}, {"kind": "dance", "url": A}, {"kind": "check", "url": B, "down": True}]
    for news in unknown:
        pool.apply(news)
    assert pool.describe() == before


async def test_a_pool_describes_itself(new_session: NewSession) -> None:
    clock = Clock()
    pool = pool_of(A, B, clock=clock)
    await pool.acquire(new_session())
    pool.failed(pool.servers[0], "connection refused")
    pool.checked(pool.servers[1], "", 0.0123)
    clock.now += 0.5
    described: Any = json.loads(json.dumps(pool.describe()))
    assert described["name"] == "mta" and described["protocol"] == "smtp" and described["waiting"] == 0
    a, b = described["servers"]
    assert a == {
        "url": A, "weight": 1, "configured_weight": 1, "drained": False, "state": "ejected", "active": 1, "total": 1,
        "idle": 0, "failures": 1, "last_error": "connection refused", "share": 0.0, "latency_ms": None, "since": 0.5,
    }  # fmt: skip
    assert (b["state"], b["latency_ms"], b["since"]) == ("up", 12.3, None)
    clock.now += 15.5
    described = pool.describe()
    assert (described["servers"][0]["state"], described["servers"][0]["share"]) == ("slow", 0.5)
    pool = pool_of(A, clock=clock)
    pool.failed(pool.servers[0], "silence", slow=True)
    assert states(pool) == ["resting"]

"""The Redis store with each way to run Redis: TLS and passwords, sentinels that fail over, a cluster whose slots move."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest
from redis.crc import key_slot

from gateway.state import redis_line
from gateway.state.redis_store import RedisStore
from gateway.state.settings import StoreSettings
from gateway.state.store import StoreError, Window
from tests.interop.conftest import Authority
from tests.peers.process import scratch, wait_for
from tests.peers.redis import RedisCluster, RedisServer, SentinelTrio, ask_port

pytestmark = pytest.mark.anyio
WINDOW = [Window(1_000_000, 365 * 86_400.0)]
T = TypeVar("T")


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server is tried again soon, to keep the tests short."""
    monkeypatch.setattr(redis_line, "RETRY", 0.05)


@asynccontextmanager
async def opened(
    url: str, *, verify: bool = True, ca_file: Path | None = None, password: str = "", timeout: float = 2.0
) -> AsyncIterator[RedisStore]:
    settings = StoreSettings(kind="redis", url=url, ca_file=ca_file, password=password, timeout=timeout)
    store = RedisStore(settings, owner="w", verify=verify)
    try:
        await store.open()
        yield store
    finally:
        await store.close()


async def eventually(call: Callable[[], Awaitable[T]]) -> T:
    """The first answer that is no StoreError."""
    async with asyncio.timeout(20):
        while True:
            try:
                return await call()
            except StoreError:
                await asyncio.sleep(0.005)


async def all_calls(store: RedisStore) -> None:
    """Every method, with the answers of an empty store."""
    assert [hit.counts for hit in await asyncio.gather(*[store.hit("k", WINDOW) for _ in range(3)])] == [(1,), (2,), (3,)]
    lease = await store.hold("k", 1)
    assert lease is not None and await store.hold("k", 1) is None
    await store.put("k", b"\0v", 60)
    assert await store.get("k") == b"\0v"
    assert sorted(entry.kind for entry in await store.entries("k")) == ["held", "rate", "value"]
    assert await store.clear("k")
    lease.release()
    assert await store.entries("") == []


@pytest.fixture
def tls_server(authority: Authority) -> Iterator[RedisServer]:
    with scratch() as folder, RedisServer(folder, password="s3 cr@t", tls=authority.issue("127.0.0.1")) as server:
        yield server


async def test_tls_and_password(tls_server: RedisServer, authority: Authority) -> None:
    host = f"127.0.0.1:{tls_server.port}"
    async with opened(f"rediss://:s3%20cr%40t@{host}/3", ca_file=authority.ca) as store:
        await all_calls(store)
        await store.put("in", b"3", 60)
    async with opened(f"rediss://{host}/2", ca_file=authority.ca, password="s3 cr@t") as store:
        assert await store.get("in") is None  # of the other database
    async with opened(f"rediss://default@{host}/3", verify=False, password="s3 cr@t") as store:
        assert await store.get("in") == b"3"


@pytest.mark.parametrize(
    ("url", "known", "text"),
    [
        ("rediss://:s3%20cr%40t@127.0.0.1", False, "certificate"),
        ("rediss://:s3%20cr%40t@localhost", True, "certificate"),
        ("rediss://:other@127.0.0.1", True, "password"),
        ("rediss://127.0.0.1", True, "password"),
        ("redis://:s3%20cr%40t@127.0.0.1", True, "redis at"),
    ],
    ids=["unknown authority", "another name", "wrong password", "no password", "without TLS"],
)
async def test_not_let_in(tls_server: RedisServer, authority: Authority, url: str, known: bool, text: str) -> None:
    async with opened(f"{url}:{tls_server.port}", ca_file=authority.ca if known else None) as store:
        with pytest.raises(StoreError, match=text) as caught:
            await store.hit("a", WINDOW)
        assert "cr@t" not in str(caught.value) and "other" not in str(caught.value)


async def test_valkey() -> None:
    if shutil.which("valkey-server") is None:
        pytest.skip("no Valkey; it speaks the same protocol as the Redis of the other tests")
    with scratch() as folder, RedisServer(folder, server="valkey-server") as server:
        async with opened(f"unix://{server.path}") as store:
            await all_calls(store)


@pytest.mark.parametrize("end", ["killed", "hung"])
async def test_sentinels_fail_over(end: str) -> None:
    """The master is lost, a replica is made master, and the store finds it with what was counted."""
    with scratch() as folder, SentinelTrio(folder, "pw") as trio, contextlib.ExitStack() as stack:
        async with opened(trio.url, password="pw", timeout=0.5) as store:
            await all_calls(store)
            await store.hit("a", WINDOW, 7)
            master, *replicas = trio.servers
            for replica in replicas:
                await asyncio.to_thread(wait_for, lambda r=replica: "gateway:rate:a" in r.keys(), "replication")  # type: ignore[misc]  # noqa: SIM118
            if end == "killed":
                await asyncio.to_thread(master.kill)
            else:
                stack.enter_context(master.stopped())
            assert (await eventually(lambda: store.hit("a", WINDOW))).counts == (8,)
            assert sum("role:master" in str(replica.ask("INFO", "replication")) for replica in replicas) == 1


async def test_sentinels() -> None:
    """One that hangs or is gone is passed over; a name that none knows is said."""
    with scratch() as folder, SentinelTrio(folder) as trio, trio.sentinels[0].stopped():
        trio.sentinels[1].stop()
        async with opened(trio.url) as store:
            assert (await store.hit("a", WINDOW)).counts == (1,)
        async with opened(f"redis+sentinel://127.0.0.1:{trio.sentinels[2].port}/other") as store:
            with pytest.raises(StoreError, match="redis service other: the sentinels know no master of that name"):
                await store.hit("a", WINDOW)


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[RedisCluster]:
    with scratch() as folder, RedisCluster(folder) as running:
        yield running


@pytest.fixture
def cluster(shared_cluster: RedisCluster) -> RedisCluster:
    for node in shared_cluster.nodes:
        node.ask("FLUSHALL")
    return shared_cluster


async def test_cluster(cluster: RedisCluster) -> None:
    async with opened(f"redis+cluster://127.0.0.1:{cluster.nodes[1].port}") as store:
        await all_calls(store)
        keys = [f"k{number}" for number in range(60)]
        await asyncio.gather(*[store.hit(key, WINDOW, 2) for key in keys])
        leases = await asyncio.gather(*[store.hold(key, 1) for key in keys])
        assert None not in leases
        counts = [len(node.keys()) for node in cluster.nodes]
        assert sum(counts) == 120 and min(counts) > 0
        assert {entry.key for entry in await store.entries("k")} == set(keys)
        for node in cluster.nodes:
            node.ask("FLUSHALL")
        assert await store._renew()
        assert sum(len(node.keys()) for node in cluster.nodes) == 60
    assert [node.keys() for node in cluster.nodes] == [[], [], []]


async def test_a_slot_moves(cluster: RedisCluster) -> None:
    """While it is on its way (ASK), after it has come (MOVED), and from then on without a hint."""
    slot = str(key_slot(b"gateway:rate:a"))
    async with opened(cluster.url) as store:
        assert (await store.hit("a", WINDOW)).counts == (1,)
        old = next(node for node in cluster.nodes if node.keys())
        new = next(node for node in cluster.nodes if node is not old)
        old_id, new_id = str(old.ask("CLUSTER", "MYID")), str(new.ask("CLUSTER", "MYID"))
        new.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", old_id)
        old.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", new_id)
        try:
            old.ask("MIGRATE", "127.0.0.1", str(new.port), "gateway:rate:a", "0", "5000")
            assert (await store.hit("a", WINDOW)).counts == (2,)
        finally:
            for node in cluster.nodes:
                ask_port(node.port, "CLUSTER", "SETSLOT", slot, "NODE", new_id)
        hits = await asyncio.gather(*[store.hit("a", WINDOW) for _ in range(5)])
        assert sorted(hit.counts[0] for hit in hits) == [3, 4, 5, 6, 7]
        assert new.keys() == ["gateway:rate:a"]


async def test_a_node_is_lost() -> None:
    """Calls for its keys fail; when it is back they work, and at no time does anything hang."""
    with scratch() as folder, RedisCluster(folder, "--cluster-require-full-coverage", "no") as cluster:
        async with opened(cluster.url) as store:
            keys = [f"k{number}" for number in range(30)]
            await asyncio.gather(*[store.hit(key, WINDOW) for key in keys])
            lost = cluster.nodes[0]
            of_lost = {key.removeprefix("gateway:rate:") for key in lost.keys()}  # noqa: SIM118
            await asyncio.to_thread(lost.kill)
            results = await asyncio.gather(*[store.hit(key, WINDOW) for key in keys], return_exceptions=True)
            assert {key for key, result in zip(keys, results, strict=True) if isinstance(result, StoreError)} == of_lost
            await asyncio.to_thread(lost.start)
            for key in keys:
                assert (await eventually(lambda key=key: store.hit(key, WINDOW))).counts == (1 if key in of_lost else 3,)  # type: ignore[misc]


async def test_no_cluster() -> None:
    with scratch() as folder, RedisServer(folder) as server:
        async with opened(f"redis+cluster://127.0.0.1:{server.port}") as store:
            with pytest.raises(StoreError, match="cluster support disabled"):
                await store.hit("a", WINDOW)

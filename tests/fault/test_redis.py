"""The Redis store when its server is away, hung, full, no longer the master, or comes back: errors at once, never a hang."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from gateway.state import redis_line
from gateway.state.redis_store import RedisStore
from gateway.state.settings import StoreSettings
from gateway.state.store import Lease, StoreError, Window
from tests.interop.conftest import Records
from tests.peers.process import free_port, scratch
from tests.peers.redis import RedisServer
from tests.peers.scripted import Scripted, Send, Step

WINDOW = [Window(1_000_000, 365 * 86_400.0)]
UVLOOP = pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["uvloop"])
pytestmark = [pytest.mark.anyio, UVLOOP]
T = TypeVar("T")


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with scratch() as folder, RedisServer(folder) as running:
        yield running


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server is tried again soon, to keep the tests short."""
    monkeypatch.setattr(redis_line, "RETRY", 0.05)


@asynccontextmanager
async def opened(url: str, timeout: float = 2.0, **more: float) -> AsyncIterator[RedisStore]:
    store = RedisStore(StoreSettings(kind="redis", url=url, timeout=timeout), owner="w", **more)  # type: ignore[arg-type]
    try:
        await store.open()
        yield store
    finally:
        await store.close()


def at(server: RedisServer) -> str:
    return f"unix://{server.path}"


async def eventually(call: Callable[[], Awaitable[T]]) -> T:
    """The first answer that is no StoreError."""
    async with asyncio.timeout(15):
        while True:
            try:
                return await call()
            except StoreError:
                await asyncio.sleep(0.005)


async def fails_at_once(store: RedisStore) -> str:
    """The error of a call that waits for nothing, as while the store is known to be away."""
    task = asyncio.create_task(store.hit("a", WINDOW))
    for _ in range(3):
        await asyncio.sleep(0)
    assert task.done()
    error = task.exception()
    assert isinstance(error, StoreError) and "hidden" not in str(error)
    return str(error)


async def test_away_at_the_start(records: Records) -> None:
    """It starts all the same, warns, and finds the server once it is there."""
    with scratch() as folder:
        server = RedisServer(folder)
        async with opened(at(server)) as store:
            assert records.all("store_unreachable")
            assert "No such file" in await fails_at_once(store)
            with server:
                assert (await eventually(lambda: store.hit("a", WINDOW))).counts == (1,)


async def test_nobody_listens() -> None:
    port = free_port()
    async with opened(f"redis://:hidden@127.0.0.1:{port}") as store:
        assert await fails_at_once(store) == f"redis at 127.0.0.1:{port}: Connection refused"


async def test_killed_and_started_again_under_calls(server: RedisServer) -> None:
    """Callers never wait longer than the time-out, and go on by themselves, scripts and all; one connection each time."""
    async with opened(at(server)) as store:
        async with asyncio.TaskGroup() as group:
            over = asyncio.Event()

            async def call() -> None:
                while not over.is_set():
                    try:
                        await store.hit("a", WINDOW)
                    except StoreError:
                        await asyncio.sleep(0)

            for _ in range(20):
                group.create_task(call())
            for _ in range(3):
                for _ in range(100):
                    await store.hit("b", WINDOW)
                await asyncio.to_thread(server.kill)
                with pytest.raises(StoreError):
                    while True:
                        await store.get("x")
                await asyncio.to_thread(server.start)
                await eventually(lambda: store.get("x"))
            over.set()
        clients = str(server.ask("CLIENT", "LIST")).splitlines()
        assert len([line for line in clients if "cmd=client" not in line]) == 1


async def test_hung(server: RedisServer) -> None:
    """Every call that waits ends with the time-out, later ones at once, and all is well when it goes on."""
    async with opened(at(server), timeout=0.3) as store:
        await store.hit("a", WINDOW)
        with server.stopped():
            async with asyncio.timeout(10):
                calls = [store.hit("a", WINDOW), store.hold("a", 3), store.get("a"), store.put("a", b"", 9)]
                errors = await asyncio.gather(*calls, store.entries(""), store.clear("a"), return_exceptions=True)
            assert [type(error) for error in errors] == [StoreError] * 6
            assert {getattr(error, "reason", "") for error in errors} == {"timeout"}
            assert "no answer within 0.3 s" in str(errors[0])
            await fails_at_once(store)
        assert (await eventually(lambda: store.hit("b", WINDOW))).counts == (1,)


async def test_hung_from_the_start(server: RedisServer) -> None:
    with server.stopped():
        async with asyncio.timeout(10), opened(at(server), timeout=0.2) as store:
            await fails_at_once(store)


async def test_closing_does_not_wait_for_a_server_that_hangs(server: RedisServer) -> None:
    async with opened(at(server), timeout=0.2) as store:
        await asyncio.gather(*[store.hold("a", 100) for _ in range(50)])
        with server.stopped():
            async with asyncio.timeout(10):
                await store.close()


async def test_full(server: RedisServer) -> None:
    """What needs memory fails, what needs none works, leases go on, and the connection stays."""
    async with opened(at(server), heartbeat=0.02, lease=0.2) as store:
        await store.put("kept", b"1", 60)
        assert await store.hold("held", 1) is not None
        server.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
        server.ask("CONFIG", "SET", "maxmemory", "1")
        calls = [store.hit("a", WINDOW), store.hold("a", 3), store.put("a", b"", 9)]
        for error in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(error, StoreError)
            assert (str(error), error.reason) == (f"redis at {server.path}: is full (maxmemory)", "full")
        assert await store.get("kept") == b"1"
        begun = server.seconds()
        while server.seconds() < begun + 0.5:
            await store.get("kept")
        assert server.keys() == ["gateway:held:held", "gateway:value:kept"]
        server.ask("CONFIG", "SET", "maxmemory", "0")
        assert (await store.hit("a", WINDOW)).counts == (1,)


async def test_no_longer_the_master(server: RedisServer) -> None:
    async with opened(at(server)) as store:
        await store.hit("a", WINDOW)
        server.ask("REPLICAOF", "127.0.0.1", str(free_port()))
        with pytest.raises(StoreError, match="replica"):
            await store.hit("a", WINDOW)
        server.ask("REPLICAOF", "NO", "ONE")
        assert (await eventually(lambda: store.hit("a", WINDOW))).counts == (2,)


async def test_scripts_forgotten(server: RedisServer) -> None:
    async with opened(at(server)) as store:
        await store.hit("a", WINDOW)
        server.ask("SCRIPT", "FLUSH")
        hits = await asyncio.gather(*[store.hit("a", WINDOW) for _ in range(10)])
        assert sorted(hit.counts[0] for hit in hits) == list(range(2, 12))


async def test_connection_closed_while_nothing_is_asked(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the server's own time-out for idle clients: made anew, and no call fails for it."""
    monkeypatch.setattr(redis_line, "RETRY", 0.0)  # even young connections are replaced at once
    async with opened(at(server)) as store:
        await store.hit("a", WINDOW)
        for _ in range(3):
            lines = str(server.ask("CLIENT", "LIST")).splitlines()
            ids = [line.split()[0].removeprefix("id=") for line in lines if "cmd=client" not in line]
            server.ask("CLIENT", "KILL", "ID", ids[0])
            (line,) = await store._servers.masters()
            assert line._reader is not None
            await asyncio.wait([line._reader])
            await store.hit("a", WINDOW)


PLACES = ["redis://:hidden@{host}", "redis://nobody:hidden@{host}", "unix://:hidden@{path}", "unix://nobody:hidden@{path}"]


@pytest.mark.parametrize("url", PLACES)
async def test_wrong_password(url: str) -> None:
    with scratch() as folder, RedisServer(folder, password="right") as server:
        async with opened(url.format(host=f"127.0.0.1:{server.port}", path=server.path)) as store:
            assert "does not accept the password" in await fails_at_once(store)


ANSWERS: dict[str, tuple[list[Step], str]] = {
    "loading": ([Send(b"-LOADING Redis is loading the dataset in memory\r\n")], "is loading its data"),
    "too many": ([Send(b"-ERR max number of clients reached\r\n")], "max number of clients"),
    "another protocol": ([Send(b"220 mail.test ESMTP\r\n")], "Protocol Error"),
    "garbage": ([Send(b"\x00\xff\xfe\r\n")], "Protocol Error"),
}


@pytest.mark.parametrize("case", ANSWERS)
async def test_strange_answers(case: str) -> None:
    steps, text = ANSWERS[case]
    async with Scripted([*steps]) as peer, opened(f"redis://127.0.0.1:{peer.port}") as store:
        assert text in await fails_at_once(store)


HOLDER = """
import asyncio, sys
from gateway.state.redis_store import RedisStore
from gateway.state.settings import StoreSettings

async def hold():
    settings = StoreSettings(kind="redis", url=sys.argv[1])
    store = RedisStore(settings, owner="child", heartbeat=0.1, lease=0.5)
    leases = [await store.hold("a", 3) for _ in range(3)]
    print("held", None not in leases, flush=True)
    await asyncio.Event().wait()

asyncio.run(hold())
"""


async def test_leases_of_a_killed_worker_end(server: RedisServer) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.Popen([sys.executable, "-c", HOLDER, at(server)], stdout=subprocess.PIPE, env=environment)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held True\n"
        async with opened(at(server)) as store:
            assert await store.hold("a", 3) is None
            child.kill()
            child.wait()
            async with asyncio.timeout(10):
                leases: list[Lease] = []
                while len(leases) < 3:
                    if (lease := await store.hold("a", 3)) is not None:
                        leases.append(lease)
            assert await store.hold("a", 3) is None
    finally:
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()

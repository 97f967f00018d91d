"""The Redis store against a private server: the same answers as the memory store, and nothing without an expiry."""

from __future__ import annotations

import asyncio
import math
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio.connection import SSLConnection

from gateway.state import redis_scripts, redis_store
from gateway.state.memory import MemoryStore
from gateway.state.redis_scripts import HIT_BODY, Script
from gateway.state.redis_store import RedisStore
from gateway.state.redis_url import Place, parse_url
from gateway.state.settings import StoreSettings
from gateway.state.store import MAX_VALUE, Hit, Store, StoreError, Window
from tests.peers.process import scratch
from tests.peers.redis import RedisServer

YEAR = 365 * 86_400.0
UVLOOP = pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["uvloop"])


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with scratch() as folder, RedisServer(folder) as running:
        yield running


@pytest.fixture(autouse=True)
def _empty(request: pytest.FixtureRequest) -> None:
    if "server" in request.fixturenames:
        request.getfixturevalue("server").ask("FLUSHALL")


@asynccontextmanager
async def opened(server: RedisServer, owner: str = "w", heartbeat: float = 5.0, lease: float = 15.0) -> AsyncIterator[RedisStore]:
    store = RedisStore(settings_of(server), owner=owner, heartbeat=heartbeat, lease=lease)
    try:
        await store.open()
        yield store
    finally:
        await store.close()


def settings_of(server: RedisServer, timeout: float = 2.0) -> StoreSettings:
    return StoreSettings(kind="redis", url=f"unix://{server.path}", timeout=timeout)


URLS: list[tuple[str, Place]] = [
    ("redis://a", Place("one", (("a", 6379),))),
    ("redis://u%40:p%2Fw@a:1/3", Place("one", (("a", 1),), db=3, user="u@", password="p/w")),
    ("rediss://:pw@[::1]:7", Place("one", (("::1", 7),), password="pw", tls=True)),
    ("unix:///run/r.sock?db=2", Place("one", (), path="/run/r.sock", db=2)),
    ("unix://u:p@/run/r.sock", Place("one", (), path="/run/r.sock", user="u", password="p")),
    (
        "redis+sentinel://:pw@a,b:2/mail/1?sentinel_password=s",
        Place("sentinel", (("a", 26379), ("b", 2)), service="mail", db=1, password="pw", sentinel_password="s"),
    ),
    ("rediss+cluster://a,b:2", Place("cluster", (("a", 6379), ("b", 2)), tls=True)),
]


@pytest.mark.parametrize(("url", "place"), URLS, ids=[url for url, _ in URLS])
def test_url(url: str, place: Place) -> None:
    assert parse_url(url) == place


def test_a_password_beside_the_url_is_used_if_the_url_has_none() -> None:
    assert parse_url("redis://a", password="x").password == "x"
    assert parse_url("redis://:own@a", password="x").password == "own"


def test_tls_believes_the_given_authorities_alone(tls_files: tuple[Path, Path]) -> None:
    connection = parse_url("rediss://a", ca_file=tls_files[0]).connection(("a", 1))
    assert isinstance(connection, SSLConnection)
    context = connection.ssl_context.get()
    assert context.check_hostname and context.verify_mode == ssl.CERT_REQUIRED
    assert context.cert_store_stats()["x509"] == 1


@pytest.mark.parametrize(
    "url",
    ["http://a", "redis:a", "redis://", "redis://a:secret", "redis://a,,b", "unix://run/secret", "redis://a/secret",
     "redis+sentinel://a", "redis+cluster://a/1", "redis://a?secret=1x", "redis://a,b"],
)  # fmt: skip
def test_no_url(url: str) -> None:
    with pytest.raises(ValueError, match=r"Redis") as caught:
        parse_url(url)
    assert "1x" not in str(caught.value) and "/secret" not in str(caught.value)


def test_passwords_are_not_shown() -> None:
    place = parse_url("redis+sentinel://:hidden@a/m?sentinel_password=hidden")
    assert "hidden" not in repr(place) + place.name


@pytest.mark.anyio
async def test_is_a_store_that_is_far(server: RedisServer) -> None:
    async with opened(server) as store:
        far: Store = store
        assert far.immediate is None


@pytest.mark.anyio
async def test_hits(server: RedisServer) -> None:
    window = [Window(3, YEAR)]
    async with opened(server) as store, opened(server) as other:
        hits = [await each.hit("ä:1", window) for each in (store, other, store, other)]
        assert [hit.allowed for hit in hits] == [True, True, True, False]
        assert [hit.counts for hit in hits] == [(1,), (2,), (3,), (3,)]
        assert hits[-1].retry_after > 0
        assert await store.hit("ä:1", window, 4) == Hit(False, math.inf, (3.0,))
        assert await store.hit("ä:1", window, 0) == Hit(True, 0.0, (3.0,))
        assert (await store.hit("ä:2", window)).allowed
        assert await store.hit("", [Window(0, 1)]) == await store.hit("a", []) == Hit(True, 0.0, ())
        with pytest.raises(ValueError, match="period"):
            await store.hit("a", [Window(1, 0)])


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.001, 0.3, 1.0, 3.7, 10.0]) | st.floats(0, 25),
            st.integers(0, 5),
            st.sampled_from(["a", "b"]),
        ),
        max_size=40,
    ),
    st.lists(
        st.builds(Window, st.integers(0, 9), st.sampled_from([0.3, 1, 7.0, 10, 60.0, 86400])), min_size=1, max_size=3
    ),
    st.floats(1e9, 2e9),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_same_answers_as_the_memory_store(
    server: RedisServer, steps: list[tuple[float, int, str]], windows: list[Window], begin: float
) -> None:
    """The same hits at the same times, to the last binary digit; the server's clock is one that the test sets."""
    now = begin
    memory = MemoryStore(lambda: now)
    script = Script(HIT_BODY, "local now = tonumber(redis.call('GET', 'clock'))")
    server.ask("FLUSHALL")

    async def compare() -> None:
        nonlocal now
        async with opened(server) as store:
            for step, n, key in steps:
                now += step
                await store._ask(b"", (b"SET", b"clock", repr(now).encode()))
                assert await store.hit(key, windows, n) == memory.hit_now(key, windows, n)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redis_store, "HIT", script)
        patch.setitem(redis_scripts.BY_SHA, script.sha, script)
        asyncio.run(compare())


@pytest.mark.parametrize(("back", "estimate"), [(1.0, 4.0), (10.0, 4.0), (1e9, 1.0)])
def test_a_clock_set_back_loses_nothing_that_is_near_and_keeps_nothing_for_ever(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch, back: float, estimate: float
) -> None:
    script = Script(HIT_BODY, "local now = tonumber(redis.call('GET', 'clock'))")
    monkeypatch.setattr(redis_store, "HIT", script)
    monkeypatch.setitem(redis_scripts.BY_SHA, script.sha, script)

    async def count() -> Hit:
        async with opened(server) as store:
            server.ask("SET", "clock", "2000000005")
            await store.hit("a", [Window(10, 10)], 3)
            server.ask("SET", "clock", repr(2000000005 - back))
            return await store.hit("a", [Window(10, 10)])

    assert asyncio.run(count()).counts == (estimate,)


def test_three_clients_at_once_are_allowed_exactly_the_limit(server: RedisServer) -> None:
    allowed: list[int] = []

    async def hammer() -> None:
        async with opened(server) as store:
            hits = await asyncio.gather(*[store.hit("a", [Window(100, YEAR)]) for _ in range(200)])
            allowed.append(sum(hit.allowed for hit in hits))

    threads = [threading.Thread(target=asyncio.run, args=(hammer(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(allowed) == 3 and sum(allowed) == 100


@pytest.mark.anyio
async def test_leases(server: RedisServer) -> None:
    async with opened(server, "one") as store, opened(server, "two") as other:
        first, second = await store.hold("a", 2), await other.hold("a", 2)
        assert first is not None and second is not None
        assert await store.hold("a", 2) is None
        first.release()
        first.release()  # idempotent: the second place stays taken
        third = await store.hold("a", 2)
        assert third is not None
        assert await store.hold("a", 2) is None
        for lease in (second, third):
            lease.release()
        await asyncio.gather(store.get("x"), other.get("x"))  # what came before it has been done
        assert server.keys() == []
        nobody = [await store.hold("", 0) for _ in range(3)]
        assert None not in nobody


@pytest.mark.anyio
async def test_close_releases_what_is_held(server: RedisServer) -> None:
    async with opened(server) as store:
        assert [await store.hold(key, 9) for key in "aab"].count(None) == 0
        assert len(server.keys()) == 2
    assert server.keys() == []
    await store.close()
    with pytest.raises(StoreError, match="closed"):
        await store.get("a")


@UVLOOP
@pytest.mark.anyio
async def test_a_cancelled_hold_holds_nothing(server: RedisServer) -> None:
    async with opened(server) as store:
        task = asyncio.create_task(store.hold("a", 1))
        await asyncio.sleep(0)  # it has asked, and nobody has read the answer
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await store.get("x")
        assert await store.hold("a", 1) is not None


@pytest.mark.anyio
async def test_a_clock_that_goes_back_leaves_no_place_taken(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or another master's clock. A place of the dead would be taken until that time comes again."""
    body = redis_scripts.HOLD.text.decode().partition("\n")[2]
    ahead = Script(body, f"{redis_scripts.NOW} now = now + 3600")
    monkeypatch.setitem(redis_scripts.BY_SHA, ahead.sha, ahead)
    async with opened(server, "lives") as store, opened(server, "dies") as dead:
        with monkeypatch.context() as patch:
            patch.setattr(redis_store, "HOLD", ahead)
            assert await dead.hold("a", 1) is not None
        assert await store.entries("a") == []
        assert await store.hold("a", 1) is not None
        assert await store.hold("a", 1) is None
        assert server.ask("ZCARD", "gateway:held:a") == 1


@UVLOOP
@pytest.mark.anyio
async def test_leases_last_as_long_as_they_are_renewed(server: RedisServer) -> None:
    async with opened(server, heartbeat=0.02, lease=0.2) as store:
        leases = [await store.hold("a", 150) for _ in range(150)]  # more than are renewed by one call
        begun = server.seconds()
        while server.seconds() < begun + 0.5:
            await store.get("x")
        assert await store.hold("a", 150) is None
        assert leases[0] is not None
        server.ask("FLUSHALL")  # a server that was started again knows nothing
        while server.ask("ZCARD", "gateway:held:a") != 150:
            await store.get("x")
        leases[0].release()
        await store.get("x")
        assert await store.hold("a", 150) is not None


@pytest.mark.anyio
async def test_values(server: RedisServer) -> None:
    async with opened(server) as store:
        assert await store.get("a") is None
        await store.put("a", b"\0\r\n\xff", 10)
        assert await store.get("a") == b"\0\r\n\xff"
        await store.put("a", b"", 0.5)
        assert await store.get("a") == b""
        await store.put("a", b"x", 0)
        assert await store.get("a") is None
        await store.put("a", b"x" * MAX_VALUE, math.inf)
        assert len(await store.get("a") or b"") == MAX_VALUE
        with pytest.raises(ValueError, match="octets"):
            await store.put("a", b"x" * (MAX_VALUE + 1), 10)


@pytest.mark.anyio
async def test_entries_and_clear(server: RedisServer) -> None:
    async with opened(server) as store:
        await store.hit("mx:a", [Window(9, YEAR), Window(9, 2 * YEAR)], 3)
        lease = await store.hold("mx:a", 5)
        await store.put("mx:a", b"v", 100)
        await store.put("mx:*?[b]\\", b"w", 100)
        await store.put("other", b"", 100)
        server.ask("SET", "rate:mx:a", "of somebody else")
        entries = await store.entries("mx:")
        assert [e.key for e in entries] == ["mx:*?[b]\\", *["mx:a"] * 4]
        assert sorted(e.kind for e in entries[1:]) == ["held", "rate", "rate", "value"]
        rates = [e for e in entries if e.kind == "rate"]
        assert [round(e.count, 3) for e in rates] == [3, 3] and all(0 < (e.expires or 0) <= 4 * YEAR for e in rates)
        held = next(e for e in entries if e.kind == "held")
        assert (held.count, held.expires) == (1, None)
        value = next(e for e in entries if e.value == b"v")
        assert 99 < (value.expires or 0) <= 100
        assert [e.key for e in await store.entries("mx:*?[b]\\")] == ["mx:*?[b]\\"]
        assert len(await store.entries("", 2)) == 2
        assert await store.entries("nobody") == []
        assert await store.clear("mx:a") is True
        assert [(e.key, e.kind) for e in await store.entries("mx:a")] == [("mx:a", "held")]
        assert await store.clear("mx:a") is False
        assert (await store.hit("mx:a", [Window(9, YEAR)])).counts == (1,)
        assert lease is not None
        lease.release()


@pytest.mark.anyio
async def test_every_key_has_an_expiry(server: RedisServer) -> None:
    async with opened(server) as store:
        for windows in ([Window(9, 0.5)], [Window(9, 60), Window(9, 3600)], [Window(9, 60)]):
            await store.hit(f"r{len(windows)}", windows)
        await store.hit("refused", [Window(1, 60)])
        await store.hit("refused", [Window(1, 60)])
        await store.hold("h", 9)
        await store.put("v", b"", 60)
        await store.put("forever", b"", math.inf)
        lives = {key: server.ask("PTTL", key) for key in server.keys()}  # noqa: SIM118
        assert len(lives) == 6
        assert all(isinstance(life, int) and life > 0 for life in lives.values()), lives
        # A rate is kept for at most two of its longest period, and as long as the earlier bucket may count.
        assert isinstance(longest := lives["gateway:rate:r2"], int) and 3_600_000 < longest <= 7_200_000
        assert isinstance(held := lives["gateway:held:h"], int) and held <= 15_000


@pytest.mark.anyio
async def test_a_check_is_one_round_trip(server: RedisServer) -> None:
    windows = [Window(9, 60), Window(99, 3600)]
    async with opened(server) as store:
        await store.hit("a", windows)
        lease = await store.hold("a", 9)
        assert lease is not None
        with Monitor(server) as monitor:
            await store.hit("a", windows)
            await store.hold("a", 9)
            lease.release()
            await store.put("a", b"1", 5)
            await store.get("a")
        assert [command for command, in_script in monitor.seen if not in_script] == ["EVALSHA", "EVALSHA", "ZREM", "SET", "GET"]


class Monitor:
    """What clients send to the server meanwhile: (command, whether a script called it)."""

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self.seen: list[tuple[str, bool]] = []

    def __enter__(self) -> Monitor:
        self._client = socket.socket(socket.AF_UNIX)
        self._client.connect(str(self._server.path))
        self._lines = self._client.makefile("r", encoding="utf-8")
        self._client.sendall(b"MONITOR\r\n")
        assert self._lines.readline() == "+OK\n"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.ask("ECHO", "over")
        while "ECHO" not in (line := self._lines.readline()):
            self.seen.append((line.split('"')[1].upper(), " lua]" in line))
        self._lines.close()
        self._client.close()


class Slow:
    """A server that answers nothing but what opens a connection before `expected` commands have come."""

    def __init__(self, path: Path, expected: int) -> None:
        self._path, self._expected = path, expected
        self.connections = 0

    async def __aenter__(self) -> Slow:
        self._server = await asyncio.start_unix_server(self._serve, self._path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        waiting = 0
        try:
            while line := await reader.readline():
                words = [await self._word(reader) for _ in range(int(line[1:]))]
                if words[0] in (b"CLIENT", b"PING"):
                    writer.write(b"+OK\r\n")
                    continue
                waiting += 1
                if waiting == self._expected:
                    writer.write(b"".join([b":%d\r\n" % number for number in range(self._expected)]))
        finally:
            writer.close()

    async def _word(self, reader: asyncio.StreamReader) -> bytes:
        size = int((await reader.readline())[1:])
        return (await reader.readexactly(size + 2))[:-2]


@pytest.mark.anyio
async def test_calls_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """All leave before the first is answered, on one connection, and each gets its own answer."""
    async with Slow(tmp_path / "s", 50) as slow:
        store = RedisStore(StoreSettings(kind="redis", url=f"unix://{tmp_path}/s"), owner="w")
        replies = await asyncio.gather(*[store._ask(b"", (b"GET", b"x")) for _ in range(50)])
        assert replies == list(range(50))
        assert slow.connections == 1
        await store.close()


@UVLOOP
@pytest.mark.anyio
async def test_a_call_given_up_takes_nobody_elses_answer(tmp_path: Path) -> None:
    async with Slow(tmp_path / "s", 3):
        store = RedisStore(StoreSettings(kind="redis", url=f"unix://{tmp_path}/s"), owner="w")
        await store.open()
        calls = [asyncio.create_task(store._ask(b"", (b"GET", b"x"))) for _ in range(2)]
        await asyncio.sleep(0)
        calls[0].cancel()
        assert await store._ask(b"", (b"GET", b"x")) == 2
        assert await calls[1] == 1
        await store.close()

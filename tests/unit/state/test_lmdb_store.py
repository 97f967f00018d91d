"""The LMDB store in one process: what it counts, how it waits, what becomes of its files."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import lmdb
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from gateway.state import lmdb_records as records
from gateway.state.lmdb_files import FileLock
from gateway.state.lmdb_store import LmdbStore
from gateway.state.memory import MemoryStore
from gateway.state.settings import StoreSettings
from gateway.state.store import MAX_VALUE, Entry, StoreError, Window

pytestmark = pytest.mark.anyio


class Clock:
    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def new(tmp_path: Path, clock: Callable[[], float], size: int = 1 << 20, timeout: float = 10.0) -> LmdbStore:
    return LmdbStore(StoreSettings("lmdb", tmp_path / "store", size=size, timeout=timeout), clock=clock)


@pytest.fixture
async def store(tmp_path: Path, clock: Clock) -> AsyncIterator[LmdbStore]:
    store = new(tmp_path, clock)
    await store.open()
    yield store
    await store.close()


@pytest.fixture
def lock(store: LmdbStore) -> Iterator[FileLock]:
    """Another holder of the lock."""
    lock = FileLock(store._path / "lock")
    yield lock
    lock.close()


async def test_rates_values_and_leases(store: LmdbStore, clock: Clock) -> None:
    assert store.immediate is None
    hits = [await store.hit("a", [Window(2, 10), Window(5, 60)]) for _ in range(3)]
    assert [hit.allowed for hit in hits] == [True, True, False]
    assert (await store.hit("", [Window(0, 1)])).allowed and (await store.hit("a", [])).allowed
    with pytest.raises(ValueError, match="period"):
        await store.hit("a", [Window(1, 0)])
    await store.put("a", b"1", 10)
    await store.put("b", b"2", 10)
    await store.put("b", b"", 0)
    assert [await store.get(key) for key in "abc"] == [b"1", None, None]
    clock.now += 10
    assert await store.get("a") is None
    with pytest.raises(ValueError, match="octets"):
        await store.put("a", bytes(MAX_VALUE + 1), 1)
    first, second = await store.hold("a", 2), await store.hold("a", 2)
    assert first is not None and second is not None and await store.hold("a", 2) is None
    first.release()
    first.release()
    assert await store.hold("a", 2) is not None and await store.hold("a", 2) is None
    assert await store.hold("", 0) is not None


async def ticked(store: LmdbStore) -> None:
    """What happens twice a second, with the copy that it makes."""
    store._tick()
    assert store._copy is not None
    await asyncio.wait([store._copy])


@pytest.mark.parametrize("key", ["k" * 128, "k" * 400, "k" * 401, "ü" * 3000, "\udc80\0"])
async def test_keys_of_any_length(store: LmdbStore, key: str) -> None:
    await store.put(key, b"1", 10)
    await store.put(key + "x", b"2", 10)
    assert (await store.hit(key, [Window(1, 60)])).allowed and not (await store.hit(key, [Window(1, 60)])).allowed
    assert [await store.get(key), await store.get(key + "x")] == [b"1", b"2"]
    assert await store.clear(key) and await store.get(key) is None


PERIODS = [0.3, 1.0, 7.0, 60.0]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[lmdb.Environment]:
    with lmdb.open(str(tmp_path_factory.mktemp("records")), map_size=64 << 20, sync=False) as env:
        yield env


@given(
    st.lists(
        st.tuples(
            st.floats(0, 20),
            st.sampled_from("ab"),
            st.lists(st.tuples(st.integers(0, 9), st.sampled_from(PERIODS)), min_size=1, max_size=3),
            st.integers(0, 5),
            st.booleans(),
        ),
        max_size=50,
    )
)
def test_counts_like_the_memory_store(
    environment: lmdb.Environment,
    steps: list[tuple[float, str, list[tuple[int, float]], int, bool]],
) -> None:
    clock = Clock()
    memory = MemoryStore(clock)
    with environment.begin(write=True) as txn:
        txn.drop(environment.open_db(None, txn), delete=False)
        for step, key, pairs, n, purge in steps:
            clock.now += step
            windows = [Window(limit, period) for limit, period in pairs]
            assert records.hit(txn, clock.now, key.encode(), windows, n) == memory.hit_now(key, windows, n)
            if purge:
                records.purge(txn, clock.now, 2)
            # Who counted nothing is not shown; which entry of a key comes first is open.
            shown = [sorted(map(repr, entries)) for entries in (
                records.entries(txn, clock.now, b"", 99), memory.entries_now("", 99)
            )]  # fmt: skip
            assert shown[0] == shown[1]


async def test_a_clock_that_is_put_back(store: LmdbStore, clock: Clock) -> None:
    assert (await store.hit("a", [Window(2, 60)], 2)).allowed
    clock.now -= 30
    assert not (await store.hit("a", [Window(2, 60)])).allowed
    clock.now -= 86400
    assert (await store.hit("a", [Window(2, 60)])).allowed


@pytest.mark.parametrize("kind", ["memory", "lmdb"])
async def test_entries_and_clear(store: LmdbStore, clock: Clock, kind: str) -> None:
    any_store = store if kind == "lmdb" else MemoryStore(clock)
    clock.now = 600.0
    await any_store.hit("p:b", [Window(9, 60)], 4)
    lease = await any_store.hold("p:c", 5)
    await any_store.put("p:a", b"1", 10)
    await any_store.put("q", b"2", 10)
    clock.now += 5
    assert await any_store.entries("p:") == [
        Entry("p:a", "value", 0, b"1", 5),
        Entry("p:b", "rate", 4, None, 115),
        Entry("p:c", "held", 1, None, None),
    ]
    assert [entry.key for entry in await any_store.entries("", 2)] == ["p:a", "p:b"]
    assert [await any_store.clear(key) for key in ("p:a", "p:b", "p:c", "p:a")] == [True, True, False, False]
    assert [entry.key for entry in await any_store.entries("")] == ["p:c", "q"]
    assert (await any_store.hit("p:b", [Window(9, 60)], 9)).allowed
    assert lease is not None
    lease.release()
    await any_store.put("q", b"", 0)
    assert [entry.key for entry in await any_store.entries("")] == ["p:b"]
    clock.now += 200
    assert await any_store.entries("") == []


# -- waiting ------------------------------------------------------------------------------------------------------


async def test_calls_wait_for_the_lock_in_order(store: LmdbStore, lock: FileLock) -> None:
    assert lock.take()
    tasks = [asyncio.ensure_future(store.hit("a", [Window(100, 60)])) for _ in range(200)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)
    lock.give()
    counts = [(await task).counts[0] for task in tasks]
    assert counts == [min(i + 1, 100) for i in range(200)]


async def test_a_wrong_call_spoils_no_other(store: LmdbStore, lock: FileLock) -> None:
    assert lock.take()
    calls = [store.hit("a", [Window(1, 60)]), store.hit("a", [Window(1, -1)]), store.hit("b", [Window(1, 60)])]
    tasks = [asyncio.ensure_future(call) for call in calls]
    await asyncio.sleep(0)
    lock.give()
    good, wrong, also = await asyncio.gather(*tasks, return_exceptions=True)
    assert not isinstance(good, BaseException) and good.allowed
    assert isinstance(wrong, ValueError)
    assert not isinstance(also, BaseException) and also.allowed


async def test_whoever_is_cancelled_holds_nothing(store: LmdbStore, lock: FileLock) -> None:
    assert lock.take()
    early = asyncio.ensure_future(store.hold("a", 2))
    late = asyncio.ensure_future(store.hold("a", 2))
    await asyncio.sleep(0)
    early.cancel()
    await asyncio.sleep(0)
    lock.give()
    assert store._pump_timer is not None
    store._pump_timer.cancel()
    store._pump()  # the place is counted; the caller has not yet run
    assert store._held == {b"a": 1}
    late.cancel()
    for task in (early, late):
        with pytest.raises(asyncio.CancelledError):
            await task
    assert [await store.hold("a", 2) is not None for _ in range(3)] == [True, True, False]


async def test_a_release_waits_for_nobody(store: LmdbStore, lock: FileLock) -> None:
    lease = await store.hold("a", 1)
    assert lease is not None and lock.take()
    lease.release()
    waits = asyncio.ensure_future(store.hold("a", 1))
    await asyncio.sleep(0)
    lock.give()
    lease = await waits
    assert lease is not None
    lease.release()
    await asyncio.sleep(0)
    assert not store._released  # without any call
    assert await store.entries("") == []


async def test_close(tmp_path: Path, clock: Clock) -> None:
    store = new(tmp_path, clock)
    await store.open()
    lease = await store.hold("a", 1)
    lock = FileLock(store._path / "lock")
    assert lock.take()
    waits = asyncio.ensure_future(store.get("a"))
    await asyncio.sleep(0)
    closes = asyncio.ensure_future(store.close())
    with pytest.raises(StoreError, match="closed"):
        await waits
    lock.close()
    await closes
    await store.close()
    assert lease is not None
    lease.release()
    with pytest.raises(StoreError, match="closed"):
        await store.get("a")
    again = new(tmp_path, clock)
    await again.open()
    assert await again.entries("") == []
    await again.close()


# -- room ---------------------------------------------------------------------------------------------------------


async def test_a_full_store_forgets_the_oldest(store: LmdbStore, clock: Clock) -> None:
    lease = await store.hold("held", 1)
    for i in range(20_000):
        clock.now += 0.01
        await store.hit(f"rate {i}", [Window(1, 3600)])
    assert not (await store.hit("rate 19999", [Window(1, 3600)])).allowed
    assert (await store.hit("rate 0", [Window(1, 3600)])).allowed
    assert await store.hold("held", 1) is None and lease is not None
    assert store._env.stat()["entries"] > 4000
    assert store._folder.live.stat().st_size == 1 << 20


async def test_values_of_all_sizes_find_room(store: LmdbStore, clock: Clock) -> None:
    """Far more than fits, the sizes always changing: no call fails, and nearly all of what was put last is there."""
    found = 0
    for i in range(3000):
        clock.now += 1
        key, value = f"value {i * 7919 % 1000}", os.urandom(i * 37 % (MAX_VALUE + 1))
        await store.put(key, value, 600 + i % 50)
        got = await store.get(key)
        assert got in (value, None)
        found += got is not None
        await store.hit(f"rate {i}", [Window(5, 60)])
    assert found > 2700
    assert all(entry.value is not None for entry in await store.entries("value"))


async def test_when_nothing_can_be_forgotten_it_is_full(store: LmdbStore) -> None:
    with pytest.raises(StoreError, match=r"lmdb store /.*: it is full") as caught:
        for i in range(100_000):
            await store.hold(f"{i:0200}", 1)
    assert caught.value.reason == "full"
    assert await store.hold(f"{0:0200}", 1) is None  # what it knew it still knows


async def test_what_expired_is_purged(store: LmdbStore, clock: Clock) -> None:
    for i in range(100):
        await store.hit(f"{i}", [Window(1, 10)])
        await store.put(f"{i}", b"", 5)
    await store.hit("stays", [Window(1, 3600)])
    clock.now += 3000
    assert (await store.hit("0", [Window(1, 10)])).allowed
    await ticked(store)
    await ticked(store)
    assert store._env.stat()["entries"] == 4  # two keys, each with its index entry
    clock.now += 86400
    await ticked(store)
    assert store._env.stat()["entries"] == 0


# -- files --------------------------------------------------------------------------------------------------------


async def filled(tmp_path: Path, clock: Clock) -> Path:
    """A store's folder after it was closed; one hit on `a`, a place held on `b`."""
    store = new(tmp_path, clock)
    await store.open()
    await store.hit("a", [Window(1, 3600)])
    await store.hold("b", 1)
    await store.put("v", b"1", 3600)
    await store.close()
    return store._path


async def test_files_are_private(tmp_path: Path, clock: Clock) -> None:
    folder = await filled(tmp_path, clock)
    modes = {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
    assert modes == {0o600} and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(StoreError, match=r"lmdb store /.*store: the folder is writable by others"):
        await new(tmp_path, clock).open()


def other_boot(folder: Path) -> None:
    (folder / "boot").write_text("another\n")
    (folder / "live.mdb").write_bytes(b"torn" * 10_000)


def garbage(folder: Path) -> None:
    (folder / "live.mdb").write_bytes(os.urandom(100_000))


def torn(folder: Path) -> None:
    """Its pages are not what its first page says."""
    with open(folder / "live.mdb", "r+b") as file:
        file.seek(8192)
        file.write(os.urandom(100_000))


def cut(folder: Path) -> None:
    os.truncate(folder / "live.mdb", 8192)


def lost(folder: Path) -> None:
    (folder / "live.mdb").unlink()


@pytest.mark.parametrize("harm", [other_boot, garbage, torn, cut, lost])
@pytest.mark.parametrize("copy", ["good", "damaged", "short", "none"])
async def test_it_begins_with_the_copy(
    tmp_path: Path, clock: Clock, harm: Callable[[Path], None], copy: str
) -> None:
    folder = await filled(tmp_path, clock)
    harm(folder)
    if copy == "damaged":
        with open(folder / "copy", "r+b") as file:
            file.seek(5000)
            file.write(b"damage")
    elif copy == "short":
        os.truncate(folder / "copy", 10)
    elif copy == "none":
        (folder / "copy").unlink()
    store = new(tmp_path, clock)
    with capture_logs() as log:
        await store.open()
    assert (await store.hit("a", [Window(1, 3600)])).allowed is (copy != "good")
    assert await store.get("v") == (b"1" if copy == "good" else None)
    assert await store.hold("b", 1) is not None
    await store.close()
    if not (harm is lost and copy != "good"):
        assert [(record["event"], record["contents"]) for record in log] == [
            ("store_restored", "copy" if copy == "good" else "empty")
        ]
    store = new(tmp_path, clock)
    with capture_logs() as log:
        await store.open()
    await store.close()
    assert not log


async def test_the_last_half_second_is_copied(store: LmdbStore, tmp_path: Path) -> None:
    await store.hit("a", [Window(1, 3600)])
    store._control.note_copy(0, 0.0)
    await ticked(store)
    assert store._control.copied == store._env.info()["last_txnid"]
    before = (store._folder.copy.stat().st_ino, store._folder.copy.stat().st_mtime_ns)
    await ticked(store)  # nothing changed
    assert before == (store._folder.copy.stat().st_ino, store._folder.copy.stat().st_mtime_ns)


async def test_a_copy_that_fails_is_logged_once(store: LmdbStore) -> None:
    (store._path / "copy.new").mkdir()
    with capture_logs() as log:
        for i in range(3):
            await store.put("a", b"%d" % i, 60)
            await ticked(store)
    assert [record["event"] for record in log] == ["store_not_copied"]
    (store._path / "copy.new").rmdir()


async def test_all_follow_to_a_new_database(store: LmdbStore) -> None:
    """One that finds the database damaged replaces it; the others keep their places and give them back there."""
    kept, given = await store.hold("a", 2), await store.hold("a", 2)
    await store.hit("r", [Window(1, 3600)])
    store._control.next_epoch()
    store._folder.live.unlink()
    assert kept is not None and given is not None
    given.release()
    assert (await store.hit("r", [Window(1, 3600)])).allowed
    assert await store.entries("a") == [Entry("a", "held", 1, None, None)]
    assert await store.hold("a", 1) is None


async def test_damage_is_repaired_while_it_runs(store: LmdbStore, monkeypatch: pytest.MonkeyPatch) -> None:
    await store.hit("r", [Window(5, 3600)])
    lease = await store.hold("a", 1)
    real, failures = records.get, [lmdb.CorruptedError("torn")]

    def get(txn: records.Transaction, now: float, key: bytes) -> bytes | None:
        if failures:
            raise failures.pop()
        return real(txn, now, key)

    monkeypatch.setattr(records, "get", get)
    with capture_logs() as log:
        assert await store.get("v") is None
    assert [record["event"] for record in log] == ["store_restored"]
    assert lease is not None and await store.hold("a", 1) is None


async def test_a_copy_of_what_was_damaged_already_is_given_up(store: LmdbStore) -> None:
    """Else each call that meets the damage would go back to it, and fail again."""
    for number in range(2000):
        await store.hit(f"k{number}", [Window(9, 3600)])
    with open(store._folder.live, "r+b") as file:
        for page in range(10, store._env.info()["last_pgno"]):
            file.seek(page * 4096 + 8)
            file.write(b"\xff" * 8)
    store._make_copy()
    with capture_logs() as log:
        for number in range(2000):
            assert (await store.hit(f"k{number}", [Window(9, 3600)])).allowed
    assert [record["contents"] for record in log] == ["copy", "empty"]

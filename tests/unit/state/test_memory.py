"""The memory store: rates, leases, values, and that nothing in it grows without bound."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.state.memory import MemoryStore
from gateway.state.store import MAX_VALUE, ImmediateStore, Store, Window


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> MemoryStore:
    return MemoryStore(clock)


def test_is_both_interfaces(store: MemoryStore) -> None:
    far: Store = store
    near: ImmediateStore | None = far.immediate
    assert near is store


def test_limit_is_reached_and_not_passed(store: MemoryStore) -> None:
    hits = [store.hit_now("a", [Window(3, 10)]) for _ in range(5)]
    assert [hit.allowed for hit in hits] == [True, True, True, False, False]
    assert [hit.counts for hit in hits] == [(1,), (2,), (3,), (3,), (3,)]
    assert store.hit_now("b", [Window(3, 10)]).allowed


def test_earlier_bucket_fades(store: MemoryStore, clock: Clock) -> None:
    for _ in range(10):
        store.hit_now("a", [Window(10, 10)])
    clock.now += 10  # the bucket of those hits has just ended: all of them still count
    assert not store.hit_now("a", [Window(10, 10)]).allowed
    clock.now += 5  # half of them
    hit = store.hit_now("a", [Window(10, 10)], 5)
    assert hit == (True, 0.0, (10.0,))
    assert not store.hit_now("a", [Window(10, 10)]).allowed
    clock.now += 15  # two buckets on: none
    assert store.hit_now("a", [Window(10, 10)], 7).counts == (7,)


@pytest.mark.parametrize(
    ("fill", "n", "wait"),
    [(10, 1, 11.0), (10, 10, 20.0), (10, 11, math.inf), (4, 8, 15.0), (0, 11, math.inf)],
)
def test_retry_after_is_when_it_fits(store: MemoryStore, clock: Clock, fill: int, n: int, wait: float) -> None:
    window = [Window(10, 10)]
    if fill:
        assert store.hit_now("a", window, fill).allowed
    hit = store.hit_now("a", window, n)
    assert not hit.allowed
    assert hit.retry_after == pytest.approx(wait)
    if wait != math.inf:
        clock.now += wait - 0.01
        assert not store.hit_now("a", window, n).allowed
        clock.now += 0.01
        assert store.hit_now("a", window, n).allowed


def test_refused_hit_counts_in_no_window(store: MemoryStore) -> None:
    windows = [Window(5, 60), Window(2, 1)]
    assert [store.hit_now("a", windows).allowed for _ in range(4)] == [True, True, False, False]
    assert store.hit_now("a", [Window(5, 60)], 3).allowed
    assert not store.hit_now("a", [Window(5, 60)]).allowed


def test_windows_of_one_period_share_a_counter(store: MemoryStore) -> None:
    windows = [Window(5, 60), Window(2, 60)]
    assert [store.hit_now("a", windows).counts for _ in range(3)] == [(1, 1), (2, 2), (2, 2)]


def test_empty_key_and_no_window_are_not_counted(store: MemoryStore) -> None:
    assert all(store.hit_now("", [Window(0, 1)]).allowed for _ in range(3))
    assert store.hit_now("a", []).allowed
    assert not store.hit_now("a", [Window(0, 1)]).allowed
    leases = [store.hold_now("", 0) for _ in range(3)]
    assert None not in leases


def test_period_must_be_positive(store: MemoryStore) -> None:
    with pytest.raises(ValueError, match="period"):
        store.hit_now("a", [Window(1, 0)])


@given(
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 4)), max_size=60),
    st.integers(1, 12),
    st.sampled_from([0.3, 1.0, 7.0, 10.0]),
)
def test_bounds_of_the_approximation(steps: list[tuple[float, int]], limit: int, period: float) -> None:
    """Fewer than twice the limit in any period; and after `retry_after` alone, a hit fits."""
    clock = Clock()
    store = MemoryStore(clock)
    taken: list[float] = []
    for step, n in steps:
        clock.now += step
        hit = store.hit_now("a", [Window(limit, period)], n)
        if hit.allowed:
            taken += [clock.now] * n
        elif n <= limit:
            assert 0 < hit.retry_after <= 2 * period * (1 + 1e-9)
        else:
            assert hit.retry_after == math.inf
    for start in taken:
        assert len([t for t in taken if start <= t < start + period]) < 2 * limit or limit == 0
    last = store.hit_now("a", [Window(limit, period)])
    if not last.allowed:
        clock.now += last.retry_after
        assert store.hit_now("a", [Window(limit, period)]).allowed


def test_leases(store: MemoryStore) -> None:
    first, second = store.hold_now("a", 2), store.hold_now("a", 2)
    assert first is not None and second is not None
    assert store.hold_now("a", 2) is None
    first.release()
    first.release()  # idempotent: the second place stays taken
    third = store.hold_now("a", 2)
    assert third is not None
    assert store.hold_now("a", 2) is None
    second.release()
    third.release()
    assert store._held == {}


def test_values_expire(store: MemoryStore, clock: Clock) -> None:
    store.put_now("a", b"1", 10)
    assert store.get_now("a") == b"1"
    clock.now += 10
    assert store.get_now("a") is None
    store.put_now("a", b"2", 10)
    store.put_now("a", b"2", 0)
    assert store.get_now("a") is None
    with pytest.raises(ValueError, match="octets"):
        store.put_now("a", bytes(MAX_VALUE + 1), 1)


def test_memory_is_bounded(clock: Clock) -> None:
    store = MemoryStore(clock, max_entries=100, max_values=100)
    for i in range(1000):
        store.hit_now(f"k{i}", [Window(1, 10)])
        store.put_now(f"k{i}", b"x", 5)
        clock.now += 0.001
    buckets = store._buckets[10]
    assert len(buckets.running) <= 100
    assert len(store._values) <= 100
    assert store.get_now("k999") == b"x"
    assert not store.hit_now("k999", [Window(1, 10)]).allowed
    clock.now += 100
    for _ in range(200):
        store.put_now("same", b"x", 5)
    assert len(store._values) == 1  # expired ones were swept although nobody asked for them
    store.hit_now("new", [Window(1, 10)])
    assert list(buckets.running) == ["new"] and not buckets.before


@pytest.mark.anyio
async def test_coroutines_do_the_same(store: MemoryStore) -> None:
    assert (await store.hit("a", [Window(1, 1)])).allowed
    assert not (await store.hit("a", [Window(1, 1)])).allowed
    lease = await store.hold("a", 1)
    assert lease is not None and await store.hold("a", 1) is None
    await store.put("v", b"1", 1)
    assert await store.get("v") == b"1"
    await store.close()
    assert await store.get("v") is None

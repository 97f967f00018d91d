"""A watched store: what is measured, and that its going away is logged once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from structlog.testing import capture_logs

from gateway.observe import metrics
from gateway.state import watched
from gateway.state.memory import MemoryStore
from gateway.state.store import Entry, Hit, StoreError, Window, is_logged
from gateway.state.watched import WatchedStore

pytestmark = pytest.mark.anyio


class Away(MemoryStore):
    """A store that can be away."""

    away = False

    async def hit(self, key: str, windows: Sequence[Window], n: int = 1) -> Hit:
        if self.away:
            raise StoreError("nobody there", "unreachable")
        return await super().hit(key, windows, n)


async def test_calls_are_passed_on_and_measured() -> None:
    store = WatchedStore(MemoryStore(lambda: 600.0), "redis")
    seconds = {name: metrics.histogram("gateway_store_seconds", store="redis", operation=name).count
               for name in ("hit", "hold", "get", "put", "entries", "clear")}  # fmt: skip
    assert (await store.hit("a", [Window(1, 60)])).allowed
    lease = await store.hold("a", 1)
    assert lease is not None and await store.hold("a", 1) is None
    await store.put("b", b"1", 10)
    assert await store.get("b") == b"1"
    assert await store.entries("b") == [Entry("b", "value", 0, b"1", 10)]
    assert await store.clear("b")
    assert store.immediate is store.store.immediate
    now = {name: metrics.histogram("gateway_store_seconds", store="redis", operation=name).count for name in seconds}
    assert {name: now[name] - seconds[name] for name in now} == {
        "hit": 1, "hold": 2, "get": 1, "put": 1, "entries": 1, "clear": 1,
    }  # fmt: skip


async def test_going_away_is_logged_once() -> None:
    inner = Away(lambda: 600.0)
    store = WatchedStore(inner, "lmdb")
    up = metrics.gauge("gateway_store_up", store="lmdb")
    errors = metrics.counter("gateway_store_errors_total", store="lmdb", operation="hit", error="unreachable")
    before = errors.value
    with capture_logs() as log:
        for away in (False, True, True, True, False, False, True):
            inner.away = away
            try:
                await store.hit("a", [Window(100, 60)])
            except StoreError:
                assert away
            assert up.value == (not away)
    assert [(record["event"], record["store"]) for record in log] == [
        ("store_down", "lmdb"), ("store_up", "lmdb"), ("store_down", "lmdb"),
    ]  # fmt: skip
    assert log[1]["failures"] == 3
    assert errors.value - before == 4
    await store.close()
    assert up.value == 0


async def test_a_call_that_was_given_up_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hangs(MemoryStore):
        async def get(self, key: str) -> bytes | None:
            return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

    store = WatchedStore(Hangs(lambda: 600.0), "redis")
    with capture_logs() as log:
        for given_up in (1e9, 0.0):
            monkeypatch.setattr(watched, "GIVEN_UP", given_up)
            call = asyncio.ensure_future(store.get("a"))
            await asyncio.sleep(0)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert bool(log) is (given_up == 0.0)
    assert [record["event"] for record in log] == ["store_down"]


async def test_only_the_first_failure_is_news(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a stage's time-out ends the call, which makes another error of it, and through `gather`."""

    class Hangs(Away):
        async def get(self, key: str) -> bytes | None:
            return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

    monkeypatch.setattr(watched, "GIVEN_UP", 0.0)
    inner = Hangs(lambda: 600.0)
    store = WatchedStore(inner, "redis")

    async def outcome(number: int) -> bool:
        inner.away = number != 3
        try:
            async with asyncio.timeout(0.02):
                if number in (0, 3, 4):
                    await store.hit("a", [Window(100, 60)])
                elif number == 1:
                    await store.get("a")
                else:
                    await asyncio.gather(store.get("a"), store.get("b"))
        except (StoreError, TimeoutError) as error:
            return is_logged(error)
        assert number == 3
        return True

    assert [await outcome(number) for number in range(5)] == [False, True, True, True, False]
    assert not is_logged(TimeoutError()) and not is_logged(StoreError("by somebody else"))


async def test_an_administrators_question_that_takes_too_long_says_nothing_of_the_store() -> None:
    class Large(MemoryStore):
        async def entries(self, prefix: str, limit: int = 1000) -> list[Entry]:
            raise StoreError("too many keys to look through", "timeout")

    store = WatchedStore(Large(lambda: 600.0), "redis")
    up = metrics.gauge("gateway_store_up", store="redis")
    errors = metrics.counter("gateway_store_errors_total", store="redis", operation="entries", error="timeout")
    before = errors.value
    with capture_logs() as log:
        with pytest.raises(StoreError):
            await store.entries("")
        assert (errors.value - before, up.value) == (1, 1)
        await store.get("a")
    assert not log

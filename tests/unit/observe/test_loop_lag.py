"""The event loop's lateness and the process's heartbeat."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from gateway.observe import metrics
from gateway.observe.counters import CounterMap, CounterRow
from gateway.observe.loop_lag import LoopLag

pytestmark = pytest.mark.anyio


@pytest.fixture
def row() -> Iterator[CounterRow]:
    shared = CounterMap.create(1)
    metrics.bind(shared.row(0), shared)
    yield shared.row(0)
    metrics.bind(CounterMap.private().row(0), None)


async def test_a_loop_that_stands_still_is_late(row: CounterRow, monkeypatch: pytest.MonkeyPatch) -> None:
    beats: asyncio.Queue[int] = asyncio.Queue()
    beat = row.beat

    def beaten(ms: int) -> None:
        beat(ms)
        beats.put_nowait(ms)

    monkeypatch.setattr(row, "beat", beaten)
    loop = asyncio.get_running_loop()
    before = time.monotonic_ns() // 1_000_000
    lag = LoopLag(row, interval=0.001)
    lag.start()
    first = beats.get_nowait()
    assert before <= first == row.heartbeat
    until = time.monotonic() + 0.05
    while time.monotonic() < until:
        pass  # the loop stands still
    assert await beats.get() >= first + 49
    observed = metrics.histogram("gateway_event_loop_lag_seconds")
    assert observed.count == 1 and observed.sum >= 0.04
    lag.stop()
    lag.stop()
    later = asyncio.Event()
    loop.call_later(0.005, later.set)
    await later.wait()
    assert observed.count == 1 and beats.empty()
    lag.start()  # again
    await beats.get()
    await beats.get()
    lag.stop()
    assert observed.count == 2

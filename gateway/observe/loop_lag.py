"""How late an event loop is: what a worker does between two callbacks, every session waits for."""

from __future__ import annotations

import asyncio
import time

from gateway.observe import metrics
from gateway.observe.counters import CounterRow


class LoopLag:
    """Measures the running loop every `interval` seconds and, at the same time, says that its process is alive.

    `row` is the process's row of the shared counters, whose heartbeat (CLOCK_MONOTONIC) the supervisor watches; None
    where there is no supervisor. Make it after `metrics.bind`.
    """

    def __init__(self, row: CounterRow | None = None, interval: float = 0.5) -> None:
        self._row = row
        self._interval = interval
        self._lag = metrics.histogram("gateway_event_loop_lag_seconds")
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin, on the running loop."""
        loop = asyncio.get_running_loop()
        self._beat()
        self._timer = loop.call_later(self._interval, self._tick, loop, loop.time() + self._interval)

    def stop(self) -> None:
        """No more; may be called twice."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        now = loop.time()
        self._lag.observe(max(0.0, now - due))
        self._beat()
        self._timer = loop.call_later(self._interval, self._tick, loop, now + self._interval)

    def _beat(self) -> None:
        if self._row is not None:
            self._row.beat(time.monotonic_ns() // 1_000_000)

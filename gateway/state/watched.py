"""A store whose time and failures are measured, and whose going away is logged once, not once a session."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from time import perf_counter
from typing import Final, Literal, TypeVar

import structlog

from gateway.observe import metrics
from gateway.state.settings import StoreKind
from gateway.state.store import Entry, Hit, ImmediateStore, Lease, Store, StoreError, Window

log = structlog.get_logger("gateway.store")

T = TypeVar("T")
GIVEN_UP: Final = 0.1
"""Seconds: a call that is cancelled later than that was given up for the stage's time-out, and counts as failed."""
_Operation = Literal["hit", "hold", "get", "put", "entries", "clear"]
_OPERATIONS: Final[tuple[_Operation, ...]] = ("hit", "hold", "get", "put", "entries", "clear")


class WatchedStore:
    """Passes every call on to `store`."""

    def __init__(self, store: Store, kind: StoreKind) -> None:
        """`kind` is the label of its metrics and log records. Make it after `metrics.bind`."""
        self.store = store
        self._kind = kind
        self._seconds = {
            name: metrics.histogram("gateway_store_seconds", store=kind, operation=name) for name in _OPERATIONS
        }
        self._errors = metrics.counters("gateway_store_errors_total", "operation", "error", store=kind)
        self._is_up = metrics.gauge("gateway_store_up", store=kind)
        self._is_up.set(1)
        self._down_since: float | None = None
        self._failures = 0

    @property
    def immediate(self) -> ImmediateStore | None:
        """The store's own: what does not wait is not measured."""
        return self.store.immediate

    async def hit(self, key: str, windows: Sequence[Window], n: int = 1) -> Hit:
        return await self._watch("hit", self.store.hit(key, windows, n))

    async def hold(self, key: str, limit: int) -> Lease | None:
        return await self._watch("hold", self.store.hold(key, limit))

    async def get(self, key: str) -> bytes | None:
        return await self._watch("get", self.store.get(key))

    async def put(self, key: str, value: bytes, ttl: float) -> None:
        await self._watch("put", self.store.put(key, value, ttl))

    async def entries(self, prefix: str, limit: int = 1000) -> list[Entry]:
        return await self._watch("entries", self.store.entries(prefix, limit))

    async def clear(self, key: str) -> bool:
        return await self._watch("clear", self.store.clear(key))

    async def close(self) -> None:
        self._is_up.set(0)
        await self.store.close()

    async def _watch(self, operation: _Operation, call: Awaitable[T]) -> T:
        begun = perf_counter()
        try:
            answer = await call
        except StoreError as error:
            self._failed(operation, error, begun)
            raise
        except asyncio.CancelledError as given_up:
            waited = perf_counter() - begun
            if waited < GIVEN_UP:
                raise
            timeout = StoreError(f"no answer for {waited:.1f} s", "timeout")
            self._failed(operation, timeout, begun)
            raise given_up from timeout  # for `is_logged`
        finally:
            self._seconds[operation].observe(perf_counter() - begun)
        if self._down_since is not None and begun >= self._down_since:
            self._works_again()
        return answer

    def _failed(self, operation: _Operation, error: StoreError, begun: float) -> None:
        self._errors[operation, error.reason].add()
        if operation == "entries":
            return  # an administrator's question: it goes through all keys, and says nothing of how sessions fare
        self._failures += 1
        error.logged = self._down_since is not None
        if self._down_since is None:
            self._down_since = begun
            self._is_up.set(0)
            log.error("store_down", store=self._kind, operation=operation, error=str(error))

    def _works_again(self) -> None:
        assert self._down_since is not None
        seconds = round(perf_counter() - self._down_since, 3)
        log.info("store_up", store=self._kind, seconds=seconds, failures=self._failures)
        self._down_since, self._failures = None, 0
        self._is_up.set(1)

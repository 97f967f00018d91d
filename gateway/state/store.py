"""The store that stages share: rates, concurrent holds and small cached values (architecture, "Shared state").

Stages see this interface only; which store is behind it (`memory` for one worker, others for all workers of a
host or for all hosts) is the operator's choice. All methods are coroutines, because a store may be far away.
One that answers from memory also offers itself as `immediate`, so that a stage which does no other waiting can
stay a plain function:

    store = worker.store.immediate
    if store is not None:
        hit = store.hit_now(key, windows)

How rates are counted. Time is cut into buckets of one period, the same for all keys. A window of `limit` hits in
`period` seconds keeps two counters for a key, the bucket that runs and the one before it, and estimates the hits
of the last `period` seconds as

    running + before * (the share of the earlier bucket that is still inside the window)

as if the earlier bucket's hits had come evenly. Bounds of this approximation, whatever the arrivals:

- in a bucket at most `limit` hits are allowed, so the long-run rate never exceeds `limit` per `period`;
- any stretch of `period` seconds sees fewer than twice `limit` allowed hits; the worst case is a full burst
  at the end of one bucket, followed by hits spread over the next;
- a hit may be refused although the stretch behind it holds fewer than `limit` hits, even none, when the earlier
  bucket was filled at its start; hits stand in nobody's way for longer than two periods;
- with even arrivals it is exact.

A refused hit is not counted: who keeps trying is let in again once the estimate allows it. An empty key stands
for "nobody known" and is never counted, since that would put strangers into one pot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Protocol

MAX_VALUE: Final = 16_384
"""Octets of a value: stores hold answers and marks, never messages."""


class StoreError(Exception):
    """The store did not answer, or not in time. The stage's `on_error` decides what that means.

    `reason` is the label of the failure's metric. `logged`: the log has it already that the store is away, so that
    one more call that fails for it is no news.
    """

    def __init__(self, text: str, reason: Literal["timeout", "unreachable", "full", "other"] = "other") -> None:
        super().__init__(text)
        self.reason = reason
        self.logged = False


def is_logged(error: BaseException) -> bool:
    """Whether an error comes of a store that the log has as away, be it that a stage's time-out ended the call."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, StoreError):
            return cause.logged
        cause = cause.__cause__
    return False


class Window(NamedTuple):
    """A rate: at most `limit` hits in any `period` seconds (within the bounds above)."""

    limit: int
    period: float


class Hit(NamedTuple):
    """What became of a hit.

    `retry_after`: 0.0 if allowed, else the seconds after which the same hit fits, should nobody else hit the
    key; `inf` if it never fits, being larger than a limit. `counts`: the estimate of each window in the order
    asked, this hit included if it was allowed; empty for an empty key.
    """

    allowed: bool
    retry_after: float
    counts: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing a store holds, as an operator sees it.

    `rate`: the hits on `key` in one period, `count` being the estimate of this moment. `held`: `count` places of a
    concurrency limit are taken. `value`: what was put, with a `count` of 0. `expires` is how many seconds from now
    the entry is gone if nobody touches it, None if it stays until it is released.
    """

    key: str
    kind: Literal["rate", "held", "value"]
    count: float
    value: bytes | None
    expires: float | None


class Lease(Protocol):
    """One unit of a concurrency limit."""

    def release(self) -> None:
        """Give it back. Idempotent, does not wait, raises nothing; a distant store learns of it soon after."""


class ImmediateStore(Protocol):
    """The same store without waiting: each method does what its namesake of `Store` does."""

    def hit_now(self, key: str, windows: Sequence[Window], n: int = 1) -> Hit: ...
    def hold_now(self, key: str, limit: int) -> Lease | None: ...
    def get_now(self, key: str) -> bytes | None: ...
    def put_now(self, key: str, value: bytes, ttl: float) -> None: ...


class Store(Protocol):
    """Shared state. Every coroutine may raise `StoreError`."""

    @property
    def immediate(self) -> ImmediateStore | None:
        """This store without waiting, or None if asking it takes I/O."""

    async def hit(self, key: str, windows: Sequence[Window], n: int = 1) -> Hit:
        """Count `n` events on `key` if every window has room for them, none of them otherwise."""
        ...

    async def hold(self, key: str, limit: int) -> Lease | None:
        """Take one of the key's `limit` places until released; None if all are taken.

        An empty key gets a lease that is not counted. Leases of a dead worker are cleared.
        """
        ...

    async def get(self, key: str) -> bytes | None:
        """The value put last, or None if there is none, it expired, or it had to make room."""
        ...

    async def put(self, key: str, value: bytes, ttl: float) -> None:
        """Keep `value` (at most `MAX_VALUE` octets, else `ValueError`) for `ttl` seconds; zero or less forgets it."""
        ...

    async def entries(self, prefix: str, limit: int = 1000) -> list[Entry]:
        """What the store holds under keys that begin with `prefix`, ordered by key, at most `limit` entries.

        A key may occur more than once: a rate for each period, and beside it places held and a value.
        """
        ...

    async def clear(self, key: str) -> bool:
        """Forget the rates and the value of exactly this key, and tell whether there were any. Leases stay."""
        ...

    async def close(self) -> None:
        """Let go of files and connections. Idempotent."""

"""Sessions that wait for a connection to a pool: first come, first served.

What this worker gives back is passed on at once. What other workers give back is noticed by looking, 20 times a
second while somebody waits.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.session import Session
    from gateway.upstream.places import Waiting
    from gateway.upstream.server import Server

LOOK_SECONDS = 0.05
GIVE_WAY_SECONDS = 0.1
GIVE_WAY_EVERY = 0.5


@dataclass(slots=True, eq=False)
class _Waiter:
    future: asyncio.Future[Server]
    session: Session
    exclude: Collection[Server]


class Line:
    """The line of one pool in one worker.

    `take` finds a server for a session that tried `exclude` already, or None; `release` takes one back.
    """

    def __init__(
        self,
        take: Callable[[Session, Collection[Server]], Server | None],
        release: Callable[[Server], None],
        waiting: Waiting,
        clock: Callable[[], float],
    ) -> None:
        self._take = take
        self._release = release
        self._waiting = waiting
        self._clock = clock
        self._waiters: deque[_Waiter] = deque()
        self._look: asyncio.TimerHandle | None = None
        self._way_until = self._no_way_before = float("-inf")

    def __len__(self) -> int:
        return len(self._waiters)

    @property
    def everywhere(self) -> int:
        """Sessions that wait in all workers."""
        return self._waiting.total(len(self._waiters))

    async def wait(self, session: Session, exclude: Collection[Server], seconds: float, late: Exception) -> Server:
        """A server, when it is this session's turn. Raises `late` after `seconds`, or what `dismiss` was given."""
        loop = asyncio.get_running_loop()
        waiter = _Waiter(loop.create_future(), session, exclude)
        self._waiters.append(waiter)
        self._waiting.add(1)
        timer = loop.call_later(seconds, _fail, waiter, late)
        if self._waiting.shared and self._look is None:
            self._look_later(loop)
        try:
            return await waiter.future
        except asyncio.CancelledError:
            # The session was ended in the very turn in which it got its server.
            if waiter.future.done() and not waiter.future.cancelled() and waiter.future.exception() is None:
                self._release(waiter.future.result())
            raise
        finally:
            timer.cancel()
            if waiter in self._waiters:
                self._leave(waiter)

    def _leave(self, waiter: _Waiter) -> None:
        self._waiters.remove(waiter)
        self._waiting.add(-1)
        if not self._waiters and self._look is not None:
            self._look.cancel()
            self._look = None

    def _look_later(self, loop: asyncio.AbstractEventLoop) -> None:
        # Not all workers at once, or each would find the others in its way.
        self._look = loop.call_later(LOOK_SECONDS * random.uniform(0.6, 1.4), self._look_now, loop)

    def _look_now(self, loop: asyncio.AbstractEventLoop) -> None:
        self._look_later(loop)
        self.serve()

    def serve(self) -> None:
        """Places may have become free: whose turn it is gets them."""
        if self._clock() < self._way_until:
            return
        for waiter in list(self._waiters):
            if waiter.future.done():
                self._leave(waiter)
                continue
            server = self._take(waiter.session, waiter.exclude)
            if server is None:
                if not waiter.exclude:
                    return
                continue
            self._leave(waiter)
            waiter.future.set_result(server)

    def gives_way(self, held: int, limit: int) -> bool:
        """Whether a place that became free is left to other workers for a moment.

        Where this worker holds more of the `limit` places (`held`) than its part of those who wait, its own line
        would else get each of them, and the lines of others none.
        """
        now = self._clock()
        if not self._waiting.shared or now < self._no_way_before:
            return False
        if held * self.everywhere <= limit * len(self._waiters):
            return False
        self._way_until, self._no_way_before = now + GIVE_WAY_SECONDS, now + GIVE_WAY_EVERY
        return True

    def dismiss(self, error: Exception) -> None:
        """Nobody need wait any longer."""
        for waiter in self._waiters:
            _fail(waiter, error)


def _fail(waiter: _Waiter, error: Exception) -> None:
    if not waiter.future.done():
        waiter.future.set_exception(error)

"""One connection to a Redis server, on which all calls of a worker travel at once.

A call is written behind those before it and its answer comes in the same order, so nobody waits for another's round
trip. Calls of the same turn of the event loop leave in one write.

When the server hangs, the oldest call's deadline ends the connection and all calls on it, for what came behind
would hang as well. From then on the server is known to be away: calls fail at once, and only the line itself tries
again, every second. A connection that merely ended is made anew at once, and calls wait for that one attempt.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, Literal, NamedTuple

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    MasterDownError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import TimeoutError as RedisTimeoutError

from gateway.state.store import StoreError

Reply = bytes | int | list["Reply"] | None
Words = tuple[bytes, ...]
Dial = Callable[[], Awaitable[AbstractConnection]]

RETRY = 1.0
"""Seconds between attempts to reach a server that is away."""

_TEXT = 160
_STALL = 0.1


def packed(words: Words) -> bytes:
    """A command as the Redis protocol writes it: an array of bulk strings."""
    return b"*%d\r\n%b" % (len(words), b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in words]))


class NoMasterError(Exception):
    """Sentinels answer, and none knows the service."""


class Failure(NamedTuple):
    """Why a server does not serve: short and in one line, and the label for metrics (see `StoreError`).

    Never holds a password: Redis and redis-py repeat none, and what is known to hold settings is not shown.
    """

    text: str
    label: Literal["timeout", "unreachable", "full", "other"]

    def error(self, name: str) -> StoreError:
        """The error for a call to the server called `name`."""
        return StoreError(f"{name}: {self.text}", self.label)


CLOSED: Final = Failure("closed", "unreachable")
LOST: Final = Failure("connection lost", "unreachable")


def no_answer(seconds: float) -> Failure:
    """A deadline that passed."""
    return Failure(f"no answer within {seconds:g} s", "timeout")


def failure(error: BaseException) -> Failure:
    """What an error of redis-py or the system means."""
    if isinstance(error.__cause__, RedisError):  # redis-py wraps what a socket's server says to a login
        error = error.__cause__
    for kind, known in _KNOWN.items():
        if isinstance(error, kind):
            return known
    text = str(error)
    if "OOM command not allowed" in text:  # from within a script, before Redis 7
        return _FULL
    cause = error.__context__ if isinstance(error.__context__, OSError) else error
    if isinstance(cause, ConnectionError | FileNotFoundError | PermissionError) and cause.errno:
        text = os.strerror(cause.errno)
    elif isinstance(cause, OSError):
        text = cause.strerror or text
    label: Literal["unreachable", "other"] = "other" if isinstance(error, ResponseError) else "unreachable"
    return Failure(" ".join(text.split())[:_TEXT] or type(error).__name__, label)


_FULL = Failure("is full (maxmemory)", "full")
_KNOWN: dict[type[BaseException], Failure] = {
    TimeoutError: Failure("does not answer", "timeout"),
    RedisTimeoutError: Failure("does not answer", "timeout"),
    AuthenticationError: Failure("does not accept the password", "unreachable"),
    BusyLoadingError: Failure("is loading its data", "unreachable"),
    ReadOnlyError: Failure("is a replica and takes no writes", "unreachable"),
    MasterDownError: Failure("is a replica without its master", "unreachable"),
    NoMasterError: Failure("the sentinels know no master of that name", "unreachable"),
    OutOfMemoryError: _FULL,
}
_GONE = (BusyLoadingError, ReadOnlyError, MasterDownError, AuthenticationError)
"""Replies after which there is no point in asking the same server again soon."""


async def opened(connection: AbstractConnection) -> AbstractConnection:
    """Connect, log in, and see that the server serves. Raises RedisError or OSError, and closes it then."""
    try:
        await connection.connect()  # type: ignore[no-untyped-call]
        await connection.send_packed_command(packed((b"PING",)), check_health=False)
        with contextlib.suppress(NoPermissionError):  # who may not ask this may still be allowed what is needed
            await connection.read_response()
    except BaseException:
        await connection.disconnect(nowait=True)
        raise
    return connection


class Line:
    """Calls to one server, over one connection that `dial` makes.

    `name` is what errors call the server. A call, and an attempt to connect, takes at most `timeout` seconds.
    """

    def __init__(self, dial: Dial, name: str, timeout: float) -> None:
        self.name = name
        self._dial = dial
        self._timeout = timeout
        self._connection: AbstractConnection | None = None
        self._away: Failure | None = None  # why calls fail at once
        self._attempt: asyncio.Future[None] | None = None  # done when the attempt that goes on has ended
        self._keeper: asyncio.Task[None] | None = None
        self._reader: asyncio.Task[None] | None = None
        self._calls: deque[tuple[asyncio.Future[Reply] | None, float]] = deque()
        self._unsent: list[bytes] = []
        self._more = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def away(self) -> bool:
        """Whether calls fail at once."""
        return self._away is not None

    async def ready(self) -> None:
        """Wait for the connection. Raises StoreError if the server is away or cannot be reached."""
        while self._connection is None:
            if self._closed:
                raise CLOSED.error(self.name)
            if self._away:
                raise self._away.error(self.name)
            if self._keeper is None:
                self._keeper = asyncio.create_task(self._keep(), name=f"line to {self.name}")
            if self._attempt is None:
                self._attempt = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._attempt)

    async def ask(self, words: Words, deadline: float) -> Reply:
        """The server's reply, until `deadline` in the loop's time.

        Raises StoreError if there is none, and redis-py's ResponseError for one that is an error.
        """
        if self._connection is None:
            try:
                async with asyncio.timeout_at(deadline):
                    await self.ready()
            except TimeoutError:
                raise no_answer(self._timeout).error(self.name) from None
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._send(words, future, deadline)
        return await future

    def tell(self, words: Words) -> None:
        """Send a command whose reply nobody needs; nothing happens if there is no connection."""
        if self._connection is not None:
            self._send(words, None, asyncio.get_running_loop().time() + self._timeout)

    async def close(self) -> None:
        """End the connection and every call. Idempotent."""
        self._closed = True
        self._away = CLOSED
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.wait([keeper])
        self._end_attempt()

    def _send(self, words: Words, future: asyncio.Future[Reply] | None, deadline: float) -> None:
        self._calls.append((future, deadline))
        self._unsent.append(packed(words))
        self._more.set()
        if self._timer is None:
            self._check_at(deadline)

    def _check_at(self, due: float) -> None:
        self._timer = asyncio.get_running_loop().call_at(due, self._check_oldest, due)

    def _check_oldest(self, due: float) -> None:
        """A deadline has come: if its call is still here, the server hangs."""
        self._timer = None
        now = asyncio.get_running_loop().time()
        if not self._calls:
            return
        oldest = self._calls[0][1]
        if oldest > now:
            self._check_at(oldest)
        elif now - due > _STALL:  # it was our own loop that stood still: replies may be there, not yet read
            self._check_at(now + _STALL)
        elif self._reader is not None:
            self._away = no_answer(self._timeout)
            self._reader.cancel()

    async def _keep(self) -> None:
        """Connect, serve, and again."""
        loop = asyncio.get_running_loop()
        while True:
            since, why = loop.time(), LOST
            try:
                async with asyncio.timeout(self._timeout):
                    connection = await self._dial()
            except Exception as error:  # whatever it is, calls must not wait for it, and the line goes on trying
                self._away = failure(error)
                self._end_attempt()
            else:
                why = await self._serve(connection)
            if self._away or loop.time() - since < RETRY:  # no busy loop with one that hangs up on us
                self._away = self._away or why
                self._end_attempt()
                await asyncio.sleep(RETRY)

    async def _serve(self, connection: AbstractConnection) -> Failure:
        """Carry calls over `connection` until it is lost, and say why; also in `_away` if calls are to fail at once."""
        self._away = None
        self._connection = connection
        self._end_attempt()
        why = LOST
        self._reader = asyncio.create_task(self._read(connection), name=f"replies of {self.name}")
        writer = asyncio.create_task(self._write(connection), name=f"calls to {self.name}")
        try:
            await asyncio.wait((self._reader, writer), return_when=asyncio.FIRST_COMPLETED)
            for task in (self._reader, writer):
                if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                    why = failure(error)
                    if isinstance(error, _GONE):
                        self._away = why
        finally:
            self._connection = None
            for task in (self._reader, writer):
                task.cancel()
            await asyncio.wait((self._reader, writer))
            await connection.disconnect(nowait=True)
            self._fail_calls(self._away or why)
        return why

    async def _read(self, connection: AbstractConnection) -> None:
        """Give each reply to the oldest call. Raises what ends the connection."""
        calls = self._calls
        while True:
            error: ResponseError | None = None
            reply: Reply = None
            try:
                reply = await connection.read_response()
            except (ReadOnlyError, MasterDownError):
                raise  # another server may be the master now
            except ResponseError as answer:
                error = answer
            future, _ = calls.popleft()
            if future is None or future.done():
                continue
            if error is None:
                future.set_result(reply)
            else:
                future.set_exception(error)

    async def _write(self, connection: AbstractConnection) -> None:
        while True:
            await self._more.wait()
            self._more.clear()
            unsent, self._unsent = self._unsent, []
            await connection.send_packed_command(unsent, check_health=False)

    def _fail_calls(self, why: Failure) -> None:
        self._unsent.clear()
        self._more.clear()
        calls = list(self._calls)
        self._calls.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for future, _ in calls:
            if future is not None and not future.done():
                future.set_exception(why.error(self.name))

    def _end_attempt(self) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.set_result(None)

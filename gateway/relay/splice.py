"""Bytes both ways between a client and its upstream, after the hand-off.

`Splice` puts a relay on both wires: what one receives is written to the other from inside the event loop's call, no
coroutine is woken for a block, and the session's coroutine waits for one future. What it keeps to:

- a wire is read only while its peer's write buffer is below the high water mark, so memory is bounded whatever the
  speeds; the end of one direction (FIN, close_notify) is passed on and the other direction goes on;
- whatever a wire had received before it was lost still goes to the other one;
- the idle clock counts both directions; once the upstream has ended its own, the client has LINGER seconds of it.

A direction between two clear connections that turns bulky (BULKY octets without an answer) moves into the kernel:
`os.splice` through a large pipe between duplicates of the two descriptors. The transports stay, one with reading
paused and one with an empty write buffer, so each direction moves by itself and can come back: it does once nothing
moved for QUIET seconds, so that quiet sessions hold no pipe and their last byte is seen again. In the kernel bytes
are counted but not seen: `last_byte` is -1 then. Without a pipe, or where splice does not work, the direction
stays in user space, which is right too, only dearer.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
from dataclasses import dataclass
from typing import Literal

from gateway.relay.wire import EndOfStream, Wire, WireTimeout

__all__ = ["PipePool", "Reason", "Splice", "SpliceResult", "pipes", "splice"]

BULKY = 512 * 1024
QUIET = 1.0
LINGER = 10.0
PIPE_SIZE = 1 << 20  # what an unprivileged process may have; smaller pipes are no cheaper than copying
PIPE_LEAST = 1 << 16  # what a user over the kernel's pipe quota gets is less
PIPES = 32  # half of what the kernel's quota gives one user at this size

Side = Literal["client", "upstream"]
Reason = Literal["client closed", "upstream closed", "client reset", "upstream reset", "idle", "goodbye", "aborted"]
CLOSED: dict[Side, Reason] = {"client": "client closed", "upstream": "upstream closed"}
RESET: dict[Side, Reason] = {"client": "client reset", "upstream": "upstream reset"}


@dataclass(frozen=True, slots=True)
class SpliceResult:
    """How it ended: octets moved to the upstream and to the client, and what ended it (the first of the two ends)."""

    bytes_up: int
    bytes_down: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class Pipe:
    """A pipe's two descriptors; non-blocking."""

    out: int
    into: int


class PipePool:
    """At most `limit` large pipes, in use and at rest together; one that is given back must be empty."""

    def __init__(self, limit: int = PIPES) -> None:
        self._limit = limit
        self._made = 0
        self._free: list[Pipe] = []

    def take(self) -> Pipe | None:
        """An empty pipe, or None if there is none to have."""
        if self._free:
            return self._free.pop()
        if self._made >= self._limit:
            return None
        try:
            pipe = Pipe(*os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError:
            return None
        self._made += 1
        try:
            fcntl.fcntl(pipe.into, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        except OSError:
            if fcntl.fcntl(pipe.into, fcntl.F_GETPIPE_SZ) < PIPE_LEAST:
                self.discard(pipe)
                return None
        return pipe

    def give(self, pipe: Pipe) -> None:
        """Take back an empty pipe."""
        self._free.append(pipe)

    def discard(self, pipe: Pipe) -> None:
        """Close a pipe."""
        os.close(pipe.out)
        os.close(pipe.into)
        self._made -= 1

    def close(self) -> None:
        """Close the pipes at rest."""
        while self._free:
            self.discard(self._free.pop())


pipes = PipePool()


class Splice:
    """One joined pair of wires. `run` it; a supervisor may look at it and say `goodbye` meanwhile.

    `last_from` is who sent last, `last_byte` the last octet (-1: not seen), `last_progress` when (loop time).
    `kernel=False` keeps everything in user space.
    """

    __slots__ = (
        "_down",
        "_ended",
        "_finished",
        "_future",
        "_loop",
        "_timer",
        "_up",
        "client",
        "idle",
        "kernel",
        "last_byte",
        "last_from",
        "last_progress",
        "upstream",
    )

    def __init__(self, client: Wire, upstream: Wire, *, idle: float, kernel: bool = True) -> None:
        self.client, self.upstream, self.idle = client, upstream, idle
        self.kernel = kernel and hasattr(os, "splice") and client.tls is None and upstream.tls is None
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[Reason] = self._loop.create_future()
        self._finished = False
        self._ended: Reason | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.last_from: Side | None = None
        self.last_byte = -1
        self.last_progress = self._loop.time()
        self._up = _Flow(self, self._loop, "client", client, upstream)
        self._down = _Flow(self, self._loop, "upstream", upstream, client)
        self._up.opposite, self._down.opposite = self._down, self._up

    @property
    def bytes_up(self) -> int:
        """Clear octets moved from the client to the upstream."""
        return self._up.moved

    @property
    def bytes_down(self) -> int:
        """Clear octets moved from the upstream to the client."""
        return self._down.moved

    async def run(self) -> SpliceResult:
        """Pass bytes until the end, then close both wires; returns when their descriptors are closed.

        What the wires had buffered goes first. A cancelled run aborts both. Raises nothing else.
        """
        try:
            self._start()
            reason = await self._future
            await self._close(reason)
        finally:
            self._finish("aborted")
            self.client.abort()
            self.upstream.abort()
            self._up.release()
            self._down.release()
        return SpliceResult(self._up.moved, self._down.moved, reason)

    def goodbye(self, data: bytes) -> None:
        """Send `data` to the client behind all that was accepted from the upstream, and end.

        It is for the caller to ask first whether the upstream was at the end of a line.
        """
        if not self._finished:
            self._up.leave()
            self._down.leave()
            self.client.write(data)
            self._finish("goodbye")

    # -- what the two flows call

    def note(self, side: Side, byte: int) -> None:
        """Bytes came from `side`."""
        self.last_from = side
        self.last_byte = byte
        self.last_progress = self._loop.time()

    def ended(self, reason: Reason) -> None:
        """One direction is over; both is the end."""
        if self._ended is None:
            self._ended = reason
            self.last_progress = self._loop.time()
        if self._up.done and self._down.done:
            self._finish(self._ended)
        else:
            self.arm()

    def lost(self, side: Side, error: BaseException | None) -> None:
        """A connection is gone: by a reset, or because someone here aborted it."""
        self._finish(self._ended or (RESET[side] if error is not None else "aborted"))

    def arm(self) -> None:
        """Set the timer anew, for the idle clock or for a look at the directions in the kernel."""
        if self._finished:
            return
        if self._timer is not None:
            self._timer.cancel()
        due = self.last_progress + self._patience()
        if self._up.in_kernel or self._down.in_kernel:
            due = min(due, self._loop.time() + QUIET)
        self._timer = self._loop.call_at(due, self._tick)

    # -- inside

    def _start(self) -> None:
        for flow in (self._up, self._down):
            flow.source.drop_deadline()
            flow.source.on_data = flow.source.on_gone = None
            flow.source.relay = flow
        for flow in (self._up, self._down):
            data = flow.source.take()
            if data:
                flow.received(data)
        for flow in (self._up, self._down):
            if flow.source.closed:
                flow.lost(flow.source.error)
            elif flow.source.eof:
                flow.ended()
        self.arm()

    def _patience(self) -> float:
        waiting = self._ended is None or self._ended == "client closed"  # a half-closed client awaits its answers
        return self.idle if waiting else min(self.idle, LINGER)

    def _tick(self) -> None:
        self._timer = None
        self._up.look()
        self._down.look()
        # The millisecond is uvloop's: its clock counts no less.
        if self._loop.time() + 0.001 >= self.last_progress + self._patience():
            self._finish(self._ended or "idle")
        else:
            self.arm()

    def _finish(self, reason: Reason) -> None:
        if self._finished:
            return
        self._finished = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for flow in (self._up, self._down):
            flow.leave()
            flow.done = True
            flow.source.relay = None
        if not self._future.done():
            self._future.set_result(reason)

    async def _close(self, reason: Reason) -> None:
        """Give both peers what is still theirs, then close."""
        for wire in (self.client, self.upstream):
            wire.set_deadline(self.idle if reason == self._ended else min(self.idle, LINGER))
            try:
                await wire.flush()
            except (EndOfStream, WireTimeout):
                wire.abort()
        # Lingering is for last words just written to a peer that may still be talking.
        if reason not in ("goodbye", "upstream reset"):
            self.client.close()
        if reason != "client reset":
            self.upstream.close()
        await self.client.aclose()
        await self.upstream.aclose()


class _Flow:
    """One direction, and the relay of its source."""

    __slots__ = (
        "_burst",
        "_destination",
        "_entering",
        "_held",
        "_loop",
        "_origin",
        "_pipe",
        "_seen",
        "_splice",
        "done",
        "moved",
        "opposite",
        "side",
        "source",
        "target",
    )

    def __init__(self, splice: Splice, loop: asyncio.AbstractEventLoop, side: Side, source: Wire, target: Wire) -> None:
        self._splice, self._loop = splice, loop
        self.side: Side = side
        self.source, self.target = source, target
        self.opposite: _Flow
        self.moved = 0
        self.done = False
        self._burst = 0
        self._entering = False
        # In the kernel: the pipe, the octets in it, the duplicates of the two descriptors, `moved` at the last look.
        self._pipe: Pipe | None = None
        self._held = 0
        self._origin = self._destination = -1
        self._seen = 0

    # -- relay of the source

    def received(self, data: bytes) -> None:
        """Pass a block on."""
        size = len(data)
        self.moved += size
        self._splice.note(self.side, data[-1])
        self.target.write(data)
        self.opposite._burst = 0
        self._burst += size
        if self._burst > BULKY and self._splice.kernel and not self.done and not self._entering:
            self._enter()

    def ended(self) -> None:
        """The source's end becomes the target's."""
        if not self.done:
            self.done = True
            self.target.write_eof()
            self._splice.ended(CLOSED[self.side])

    def lost(self, error: BaseException | None) -> None:
        """The source is gone."""
        self._splice.lost(self.side, error)

    def write_paused(self) -> None:
        """The source, as target of the opposite direction, takes no more."""
        self.target.pause()

    def write_resumed(self) -> None:
        """It takes more, or has taken all, where the opposite direction waits to move into the kernel."""
        if self.opposite._entering:
            self.opposite._enter_flushed()
        elif not self.opposite.in_kernel and not self.opposite.done:
            self.target.resume()

    # -- in the kernel

    @property
    def in_kernel(self) -> bool:
        """Whether the kernel moves this direction."""
        return self._pipe is not None

    def _enter(self) -> None:
        """Stop reading, and go on once the target's write buffer is empty: the order of bytes depends on it."""
        self._entering = True
        self.source.pause()
        self.target.notice_flushed(True)
        if self._entering and not self.target.write_buffered:
            self._enter_flushed()

    def _enter_flushed(self) -> None:
        self._entering = False
        self.target.notice_flushed(False)
        pipe = None if self.done or self.source.closed or self.target.closed else pipes.take()
        if pipe is not None:
            try:
                self._origin = os.dup(self.source.transport.get_extra_info("socket").fileno())
                self._destination = os.dup(self.target.transport.get_extra_info("socket").fileno())
            except OSError:
                self._close_duplicates()
                pipes.give(pipe)
                pipe = None
        if pipe is None:
            self._burst = 0  # try again after as much again
            self.source.resume()
            return
        self._pipe = pipe
        self._seen = self.moved
        self._loop.add_reader(self._origin, self._readable)
        self._splice.arm()

    def _readable(self) -> None:
        """Source to pipe, which is empty now."""
        assert self._pipe is not None
        try:
            size = os.splice(self._origin, self._pipe.into, PIPE_SIZE, flags=os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK)
        except BlockingIOError:
            return
        except OSError as error:
            self.leave()
            if error.errno == errno.EINVAL:  # this kind of socket cannot be spliced
                self._splice.kernel = False
                self.source.resume()
            else:
                self.lost(error)
            return
        if size == 0:
            self.leave()
            self.ended()
            return
        self.moved += size
        self.source.count_received(size)
        self._splice.note(self.side, -1)
        self._held = size
        if not self._push():
            self._loop.remove_reader(self._origin)
            self._loop.add_writer(self._destination, self._writable)

    def _writable(self) -> None:
        if self._push() and self._pipe is not None:
            self._loop.remove_writer(self._destination)
            self._loop.add_reader(self._origin, self._readable)

    def _push(self) -> bool:
        """Pipe to target; whether all has gone. May end the direction."""
        assert self._pipe is not None
        while self._held:
            try:
                size = os.splice(
                    self._pipe.out, self._destination, self._held, flags=os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
                )
            except BlockingIOError:
                return False
            except OSError:
                # The target reads no more. What it had to say may still wait in its socket (a 552, say): this
                # direction is over, the opposite one goes on to its end.
                self.leave(deliver=False)
                self.done = True
                self._splice.ended(RESET[self.opposite.side])
                return True
            self._held -= size
            self.target.count_sent(size)
        return True

    def look(self) -> None:
        """Come back to user space if nothing moved since the last look."""
        if self._pipe is not None and not self._held and self.moved == self._seen:
            self.leave()
            self.source.resume()
        self._seen = self.moved

    def leave(self, *, deliver: bool = True) -> None:
        """Come back to user space, with what the pipe holds (or drop it); the source stays paused."""
        pipe, self._pipe = self._pipe, None
        self._entering = False
        self._burst = 0
        if pipe is None:
            return
        self._loop.remove_reader(self._origin)
        self._loop.remove_writer(self._destination)
        self._close_duplicates()
        while self._held:
            data = os.read(pipe.out, self._held)
            self._held -= len(data)
            if deliver:
                self.target.write(data)
        pipes.give(pipe)

    def release(self) -> None:
        """Cut the cycles, so that an ended session's memory is free at once and not at some collection."""
        del self._splice, self.opposite

    def _close_duplicates(self) -> None:
        for descriptor in (self._origin, self._destination):
            if descriptor >= 0:
                os.close(descriptor)
        self._origin = self._destination = -1


async def splice(client: Wire, upstream: Wire, *, idle: float) -> SpliceResult:
    """Join two wires until one of them ends; `idle` in seconds. See `Splice`."""
    return await Splice(client, upstream, idle=idle).run()

"""Where one message's content stays while somebody needs it: written once, read by several.

The coroutine that reads the client writes; milters and other stages read live, as it comes; stages and the upstream
that must wait for an editor's verdict start later, from the beginning. Invariants:

- Octets are kept from the smallest offset of an open reader on; without readers nothing is kept.
- What live readers need stays in memory, and `room` holds the client up for them: they never cause a file.
- What a waiting reader needs stays in memory up to `SpoolSpace.memory`, then goes to an unlinked file. Its offsets are
  the message's offsets (in front there may be a hole), so that no reader needs to know when the file began.
- Blocks that the file holds stay in memory too for live readers close behind (`memory` octets, at most one block
  more): these get the very object that was written and cost no system call.
- A write that fails changes nothing: the block was not taken, everything before it is still there.

One event loop, no threads.
"""

from __future__ import annotations

import asyncio
import io
import os
import tempfile
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.observe import metrics

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["HIGH", "Spool", "SpoolFile", "SpoolFull", "SpoolReader", "SpoolSpace"]

HIGH = 512 * 1024  # octets that a live reader may be behind before the writer waits
READ = 1 << 18
GATHER = 65536  # the least that goes to the file in one system call, and the most that small blocks are joined to
SMALL = 1024  # blocks shorter than this are joined: an object of its own would cost more than a copy


class SpoolFull(Exception):
    """A block could not be kept; `why` says so in words: the total of all messages, or what the disk answered."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class SpoolSpace:
    """What all messages of a worker share. `used`: octets in files now.

    `directory`: where the files are, None for the system's default (tempfile.gettempdir). `memory`: octets of one
    message that stay in memory for waiting readers. `total`: octets that all files together may hold.
    """

    __slots__ = ("_gauge", "directory", "memory", "total", "used")

    def __init__(self, directory: Path | None = None, *, memory: int = 256 * 1024, total: int = 4 << 30) -> None:
        self.directory = directory
        self.memory = memory
        self.total = total
        self.used = 0
        self._gauge: metrics.Count | None = None

    def measure(self, pipeline: str) -> None:
        """Show in the metrics what is used and what may be."""
        metrics.gauge("gateway_spool_limit_bytes", pipeline=pipeline).set(self.total)
        self._gauge = metrics.gauge("gateway_spool_bytes", pipeline=pipeline)

    def charge(self, octets: int) -> None:
        """So many octets more are in files, or fewer."""
        self.used += octets
        if self._gauge is not None:
            self._gauge.set(self.used)

    def open(self) -> io.FileIO:
        """A new file without a name, mode 0600: O_TMPFILE, or mkstemp and unlink. Raises OSError."""
        return tempfile.TemporaryFile(buffering=0, dir=self.directory)


class Spool:
    """One message's content. `size`: octets written; `ended`: nothing more comes.

    `dotless`: the writer knows that no line so far begins with a dot, so that nothing there is to be unstuffed.
    """

    __slots__ = (
        "_blocks", "_charged", "_closed", "_error", "_file", "_file_end", "_kept", "_live_at", "_readers", "_space",
        "_starts", "_waiting_at", "_writer", "dotless", "ended", "size",
    )  # fmt: skip

    def __init__(self, space: SpoolSpace) -> None:
        self._space = space
        self.size = 0
        self.ended = False
        self.dotless = False
        self._error: BaseException | None = None
        self._closed = False
        # Memory: blocks without a gap up to `size`, and the offset of each. A bytearray is joined small blocks.
        self._blocks: list[bytes | bytearray] = []
        self._starts: list[int] = []
        # The file holds everything needed that is before _file_end, which is the start of a block or `size`.
        self._file: io.FileIO | None = None
        self._file_end = 0
        self._charged = 0
        # The least offset of all readers, of the live ones (`size` if there are none), of the waiting ones.
        self._readers: list[SpoolReader] = []
        self._kept = 0
        self._live_at = 0
        self._waiting_at: int | None = None
        self._writer: asyncio.Future[None] | None = None

    @property
    def in_file(self) -> bool:
        """Whether some of the content went to a file."""
        return self._charged > 0

    # -- the writer's side

    def write(self, block: bytes) -> None:
        """Add `block` for everybody who reads; it is referenced, not copied, unless it is short.

        Dropped at once if nobody reads, or after `fail`. Raises SpoolFull, and ValueError after `end` or `close`.
        """
        if self.ended or self._closed:
            raise ValueError("write to a spool that has ended")
        if not block or self._error is not None:
            return
        size = self.size + len(block)
        if not self._readers:
            self.size = self._kept = size
            return
        spill = self._waiting_at is not None and (
            size - self._file_end >= GATHER if self._charged else size - self._waiting_at > self._space.memory
        )
        if spill:
            self._spill(block)
        self._append(block)
        self.size = size
        if spill:
            self._settle()
        self._wake()

    def end(self) -> None:
        """Nothing more comes."""
        self.ended = True
        self._wake()

    def fail(self, error: BaseException) -> None:
        """Every read raises `error` from now on, whatever is unread; the first failure counts."""
        if self._error is None and not self._closed:
            self._error = error
            self._forget()

    async def room(self) -> None:
        """Wait until more may be written: at once while a waiting reader has everything kept anyway, or no reader is
        more than HIGH behind; else once the slowest has caught up to half of it, or `fail` or `close` was called.
        """
        if self._fits(HIGH):
            return
        while not self._fits(HIGH // 2):
            writer = self._writer = asyncio.get_running_loop().create_future()
            try:
                await writer
            finally:
                self._writer = None

    def close(self) -> None:
        """Give back file and account; reads raise ValueError from now on. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._forget()
        self._space.charge(-self._charged)
        file, self._file = self._file, None
        if file is not None:
            file.close()

    # -- the readers' side

    def reader(self, offset: int = 0, *, waiting: bool = False) -> SpoolReader:
        """A reader from `offset` on, for which everything is kept at once until it was read or the reader is closed.

        `waiting`: it does not read yet and must not hold up the client (an editor before it has not answered).
        Raises ValueError if octets from `offset` on were dropped already or `offset` is beyond what was written.
        """
        if self._closed:
            raise ValueError("the spool is closed")
        if self._error is None and not self._kept <= offset <= self.size:
            raise ValueError(f"offset {offset} is not kept: {self._kept} to {self.size} are")
        reader = SpoolReader(self, offset, waiting)
        self._readers.append(reader)
        self._settle()
        return reader

    def file(self) -> io.BufferedReader:
        """The whole message as a file to read and seek, which keeps it until it is closed.

        Raises ValueError unless the spool has ended and still has everything: hold a reader at 0 until then. Raises
        the error of `fail`.
        """
        self._check()
        if not self.ended:
            raise ValueError("the spool has not ended")
        return io.BufferedReader(SpoolFile(self), GATHER)

    # -- inside

    def _check(self) -> None:
        if self._closed:
            raise ValueError("the spool is closed")
        if self._error is not None:
            raise self._error.with_traceback(None)  # else each reader would add its own to the same error

    def _fits(self, behind: int) -> bool:
        over = self._closed or self._error is not None
        return over or self._waiting_at is not None or self.size - self._kept <= behind

    def _append(self, block: bytes) -> None:
        """Put `block` behind the last one in memory; `size` is still the offset it begins at."""
        blocks = self._blocks
        # A block that the file holds already is not added to: the file would end in the middle of it.
        if len(block) < SMALL and blocks and self._starts[-1] >= self._file_end:
            last = blocks[-1]
            if isinstance(last, bytearray):
                if len(last) < GATHER:
                    last += block
                    return
            elif len(last) < SMALL:
                blocks[-1] = bytearray(last + block)
                return
        blocks.append(block)
        self._starts.append(self.size)

    def _spill(self, block: bytes) -> None:
        """Write what is only in memory, and `block` behind it, to the file. Raises SpoolFull with nothing changed.

        Any error of the disk is SpoolFull, not only ENOSPC, EDQUOT and EIO: each means that the message cannot be
        kept and may be sent again later.
        """
        space, starts = self._space, self._starts
        start = max(self._file_end, starts[0] if starts else self.size)
        end = self.size + len(block)
        if space.used + end - start > space.total:
            raise SpoolFull(f"all messages together would take more than {space.total} octets")
        try:
            if self._file is None:
                self._file = space.open()
            _store(self._file.fileno(), (*self._blocks[bisect_left(starts, start) :], block), start)
        except OSError as error:
            where = self._space.directory or tempfile.gettempdir()
            raise SpoolFull(f"{where}: {error.strerror or error}") from error
        self._file_end = end
        self._charged += end - start
        space.charge(end - start)

    def _settle(self) -> None:
        """Readers came, moved, started or left: drop what nobody needs any more, let the writer go on."""
        live = kept = self.size
        waiting: int | None = None
        for reader in self._readers:
            offset = reader.offset
            if offset < kept:
                kept = offset
            if not reader._waiting:
                if offset < live:
                    live = offset
            elif waiting is None or offset < waiting:
                waiting = offset
        self._kept, self._live_at, self._waiting_at = kept, live, waiting
        self._trim()
        if self._writer is not None and self._fits(HIGH // 2):
            _done(self._writer)

    def _trim(self) -> None:
        below = self._kept
        if self._charged:
            near = max(self._live_at, self.size - self._space.memory)
            below = max(below, min(self._file_end, near))
        if below >= self.size:
            self._blocks.clear()
            self._starts.clear()
        else:
            count = bisect_right(self._starts, below) - 1  # blocks before the one that has the octet at `below`
            if count > 0:
                del self._blocks[:count], self._starts[:count]

    def _in_memory(self, offset: int) -> bool:
        return bool(self._starts) and self._starts[0] <= offset

    def _get(self, offset: int, limit: int) -> bytes:
        """Octets from `offset` (kept, and before `size`) on: at least one, at most `limit`. Raises OSError."""
        starts = self._starts
        if not self._in_memory(offset):
            assert self._file is not None
            end = starts[0] if starts else self.size
            data = os.pread(self._file.fileno(), min(limit, end - offset), offset)
            if not data:
                raise OSError("the spool's file is shorter than what was written")
            return data
        index = bisect_right(starts, offset) - 1
        block = self._blocks[index]
        at = offset - starts[index]
        if not at and len(block) <= limit:
            return bytes(block)  # the same object, if it is one that was written
        return bytes(block[at : at + limit])

    def _wake(self) -> None:
        for reader in self._readers:
            if reader._waiter is not None:
                _done(reader._waiter)

    def _forget(self) -> None:
        """Nobody will read what is in memory: wake everybody who waits to be told so."""
        self._blocks.clear()
        self._starts.clear()
        self._wake()
        if self._writer is not None:
            _done(self._writer)


class SpoolReader:
    """One reader's place in a spool; one coroutine reads. `offset`: of the next octet it reads."""

    __slots__ = ("_closed", "_spool", "_waiter", "_waiting", "offset")

    def __init__(self, spool: Spool, offset: int, waiting: bool) -> None:
        self._spool = spool
        self._waiting = waiting
        self._closed = False
        self._waiter: asyncio.Future[None] | None = None
        self.offset = offset

    def start(self) -> None:
        """No longer waiting: from now on the client is held up for this reader. Reading starts it too."""
        if self._waiting:
            self._waiting = False
            self._spool._settle()

    def available(self) -> bool:
        """Whether `read` would not wait: there are octets, or it is over one way or another."""
        spool = self._spool
        over = spool.ended or self._closed or spool._closed or spool._error is not None
        return over or self.offset < spool.size

    async def read(self, limit: int = READ) -> bytes:
        """The next octets, at least one and at most `limit`; b"" at the end. A cancelled read has read nothing.

        Raises what `fail` was given, ValueError after a `close`, OSError if the file cannot be read.
        """
        spool = self._spool
        if self.offset < spool.size and not spool._in_memory(self.offset):
            await asyncio.sleep(0)  # whoever copies a whole file must not keep the loop for as long
        while (data := self.read_now(limit)) is None:
            if self._waiter is not None:
                raise RuntimeError("two coroutines read from one reader")
            waiter = self._waiter = asyncio.get_running_loop().create_future()
            try:
                await waiter
            finally:
                self._waiter = None
        return data

    def read_now(self, limit: int = READ) -> bytes | None:
        """The same without waiting; None: nothing there yet."""
        spool = self._spool
        if self._closed:
            raise ValueError("the reader is closed")
        if limit < 1:
            raise ValueError("a read of no octets")
        spool._check()
        self.start()
        if self.offset == spool.size:
            return b"" if spool.ended else None
        data = spool._get(self.offset, limit)
        self.offset += len(data)
        spool._settle()
        return data

    def close(self) -> None:
        """Nothing is kept for this reader any more; a read under way raises ValueError. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._waiter is not None:
            _done(self._waiter)
        self._spool._readers.remove(self)
        self._spool._settle()


class SpoolFile(io.RawIOBase):
    """The whole of an ended spool as an unbuffered file; `Spool.file` makes it and buffers it."""

    def __init__(self, spool: Spool) -> None:
        super().__init__()
        self._spool = spool
        self._hold = spool.reader(0, waiting=True)
        self._offset = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill `buffer` as far as one block goes; 0 at the end. Raises as SpoolReader.read does."""
        self._checkClosed()
        self._spool._check()
        view = memoryview(buffer).cast("B")
        if not view or self._offset >= self._spool.size:
            return 0
        data = self._spool._get(self._offset, len(view))
        view[: len(data)] = data
        self._offset += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to `offset` from the start, the place, or the end; beyond the end reads find nothing."""
        self._checkClosed()
        origins = {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self._spool.size}
        if whence not in origins:
            raise ValueError(f"invalid whence {whence}")
        place = origins[whence] + offset
        if place < 0:
            raise ValueError(f"negative seek position {place}")
        self._offset = place
        return place

    def tell(self) -> int:
        self._checkClosed()
        return self._offset

    def close(self) -> None:
        """The spool need not keep the message for this file any more."""
        if not self.closed:
            super().close()
            if hasattr(self, "_hold"):  # not if the spool had dropped something, and this file never was
                self._hold.close()


def _store(descriptor: int, blocks: Iterable[bytes | bytearray], offset: int) -> None:
    """Write all blocks from `offset` on, in pieces of at least GATHER (but for the last). Raises OSError."""
    run: list[bytes | bytearray] = []
    length = 0
    for block in blocks:
        run.append(block)
        length += len(block)
        if length >= GATHER:
            offset = _pwrite(descriptor, run, offset)
            run, length = [], 0
    if run:
        _pwrite(descriptor, run, offset)


def _pwrite(descriptor: int, run: list[bytes | bytearray], offset: int) -> int:
    rest = memoryview(run[0] if len(run) == 1 else b"".join(run))
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        offset += written
        rest = rest[written:]
    return offset


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)

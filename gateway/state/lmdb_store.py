"""The store of all workers of a host: an LMDB database in shared memory, written under a file lock of its own.

LMDB lets a writer wait for another in the kernel, where a stopped process would stop every event loop. So LMDB's own
locks are off, and each call tries an flock instead. If it is free, which is nearly always, the call is over without a
suspension. Else the call is queued; one timer tries the lock for the whole queue, and a call that waited longer than
the time-out fails with `StoreError`. The kernel gives the lock of a killed process back, and LMDB's last complete
transaction is what the others see: no counter is lost.

The database is never synced, which would cost a disk access a call. A host crash may therefore tear it; it belongs to
one boot. Twice a second, if anything changed, one of the processes copies it to disk (under the lock: a copy in memory;
then without it: checksum, fsync, rename), and the first process of the next boot begins with that copy.

All processes must see the same `path` on the same host. Open the store after the fork: one in a process. Its clock is
the wall clock, since monotonic time begins anew with each boot.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final, Generic, Literal, TypeVar

import lmdb
import structlog

from gateway.state import lmdb_records as records
from gateway.state.lmdb_files import PAGE, Control, FileLock, Folder, Owners
from gateway.state.lmdb_records import Transaction, key_octets
from gateway.state.settings import StoreSettings
from gateway.state.store import MAX_VALUE, Entry, Hit, ImmediateStore, Lease, StoreError, Window

log = structlog.get_logger("gateway.store")

T = TypeVar("T")
_Operation = Callable[[Transaction, float], T]

COPY_SECONDS: Final = 0.5  # half of what a host crash may cost, so that a slow disk has the other half
_SPIN: Final = 64  # a transaction takes some 10 us: look again that long before giving way to other sessions
_FIRST_PAUSE: Final = 0.001
_LONGEST_PAUSE: Final = 0.01
_AT_ONCE: Final = 64  # queued calls that are done before sessions get a turn
_PURGED: Final = 200  # index entries a tick
_EVICTED: Final = 8  # entries forgotten in one transaction, which itself needs pages for each of them
_EVICTIONS: Final = 16  # such transactions when there is no room at all
_CLEARED: Final = 500  # keys looked at in one transaction for places of the dead
_RESERVE: Final = 64  # pages at least, and an eighth of all, that making room may use itself
_DAMAGE: Final = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.PanicError, lmdb.InvalidError)

_LOCKED: Final = "another process has the lock"
_UNCOUNTED: Final = Hit(True, 0.0, ())


class _FreeLease:
    """The lease of an empty key: nothing is counted."""

    def release(self) -> None:
        return


class _CountedLease:
    __slots__ = ("_give_back", "_key")

    def __init__(self, give_back: Callable[[bytes], None], key: bytes) -> None:
        self._give_back: Callable[[bytes], None] | None = give_back
        self._key = key

    def release(self) -> None:
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back(self._key)


@dataclass(slots=True)
class _Waiting(Generic[T]):
    """A call that found the lock taken."""

    operation: _Operation[T]
    finish: Callable[[T], None] | None
    future: asyncio.Future[T]
    deadline: float

    def answer(self, perform: Callable[[_Operation[T]], T]) -> None:
        """Do it, unless its caller has gone."""
        if self.future.done():
            return
        try:
            result = perform(self.operation)
        except (StoreError, ValueError) as error:
            self.future.set_exception(error)
            return
        if self.finish is not None:
            self.finish(result)
        self.future.set_result(result)


class LmdbStore:
    """A `Store` in a folder of this host. Call `open` first; every call may raise `StoreError`."""

    _env: lmdb.Environment
    _control: Control
    _lock: FileLock
    _copier_lock: FileLock  # the same file: a process's two threads must keep each other out as well
    _copying: FileLock
    _users: FileLock
    _owners: Owners

    def __init__(
        self, settings: StoreSettings, *, owner: str = "", clock: Callable[[], float] = time.time
    ) -> None:
        """`owner` is a name for this process, for whoever looks into the folder. Raises ValueError without a path."""
        if settings.path is None:
            raise ValueError("an lmdb store needs a path")
        self._path = settings.path
        self._size = settings.size
        self._timeout = settings.timeout
        self._name = owner
        self._clock = clock
        self._is_open = False
        self._epoch = -1
        self._ceiling = 0
        self._entries, self._pages = 0, 0
        self._waiting: deque[_Waiting[object]] = deque()
        self._pause = _FIRST_PAUSE
        self._pump_timer: asyncio.Handle | None = None
        self._tick_timer: asyncio.TimerHandle | None = None
        self._released: list[bytes] = []
        self._held: dict[bytes, int] = {}
        self._thread = ThreadPoolExecutor(1, "store-copy")
        self._copy: asyncio.Future[None] | None = None
        self._copy_failed = False

    @property
    def immediate(self) -> ImmediateStore | None:
        """None: another process may have the lock."""
        return None

    # -- open and close ------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Open the database, restore it if need be, and clear places of processes that are gone."""
        self._loop = asyncio.get_running_loop()
        opened: list[FileLock | Control | Owners] = []
        try:
            self._folder = Folder(self._path)
            self._lock = FileLock(self._path / "lock")
            opened.append(self._lock)
            self._users = FileLock(self._path / "users")
            opened.append(self._users)
            await self._taken_at_first()
            try:
                self._copier_lock = FileLock(self._path / "lock")
                opened.append(self._copier_lock)
                self._copying = FileLock(self._path / "copying")
                opened.append(self._copying)
                self._control = Control(self._path / "control")
                opened.append(self._control)
                self._owners = Owners(self._path / "owners", self._name)
                opened.append(self._owners)
                self._begin()
            finally:
                self._lock.give()
        except (OSError, lmdb.Error) as error:
            for thing in opened:
                thing.close()
            raise self._error(error) from error
        except StoreError:
            for thing in opened:
                thing.close()
            raise
        self._is_open = True
        self._tick_timer = self._loop.call_later(COPY_SECONDS, self._tick)
        await self._clear_dead()

    def _begin(self) -> None:
        """Open the database of this boot, or begin with the copy."""
        alone = self._users.take()
        reason = "" if self._folder.of_this_boot() else "another boot"
        if not reason and alone:
            reason = self._folder.damage()
        if reason:
            self._renew(reason)
        else:
            try:
                self._open_database()
            except _DAMAGE as error:
                self._renew(str(error))
        self._users.take(shared=True)

    async def close(self) -> None:
        """Give everything back, leave a copy, let go of the files."""
        if not self._is_open:
            return
        self._is_open = False
        for timer in (self._tick_timer, self._pump_timer):
            if timer is not None:
                timer.cancel()
        self._fail_waiting(float("inf"), "closed")
        with suppress(StoreError):  # who holds the lock finds out by himself that this process is gone
            await self._taken(self._timeout)
            try:
                self._transact(lambda txn, now: records.hold_again(txn, self._owners.own, {}))
            finally:
                self._lock.give()
        if self._copy is None or self._copy.done():
            self._start_copy()
        assert self._copy is not None
        await asyncio.wait([self._copy], timeout=self._timeout)
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._env.close()
        for thing in (self._owners, self._users, self._copying, self._lock):
            thing.close()
        if self._copy.done():  # else its thread still uses these; they go with the process
            self._copier_lock.close()
            self._control.close()

    async def _taken(self, seconds: float) -> None:
        """Wait for the lock, without stopping the loop."""
        deadline = self._loop.time() + seconds
        pause = _FIRST_PAUSE
        while not self._lock.take():
            if self._loop.time() > deadline:
                raise self._error(_LOCKED)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _taken_at_first(self) -> None:
        """Wait for the lock, also longer while another process looks through the whole database at its own begin."""
        while True:
            try:
                return await self._taken(self._timeout)
            except StoreError:
                if self._users.take(shared=True):
                    self._users.give()
                    raise
                # It is alone, as `_begin` has it.

    async def _clear_dead(self) -> None:
        """Whoever met a dead one's file removed it, and cleared one key only: so all keys are looked at."""
        await self._call(lambda txn, now: self._owners.forget_dead())
        after: bytes | None = b""
        while after is not None:
            after = await self._call(partial(self._clear_some, after))

    def _clear_some(self, after: bytes, txn: Transaction, now: float) -> bytes | None:
        return records.clear_dead(txn, after, _CLEARED, self._owners.alive)

    def _error(self, what: object) -> StoreError:
        reason: Literal["timeout", "full", "other"] = "timeout" if what is _LOCKED else "other"
        if isinstance(what, lmdb.MapFullError):
            what, reason = "it is full", "full"
        return StoreError(f"lmdb store {self._path}: {what}", reason)

    # -- the interface -------------------------------------------------------------------------------------------

    async def hit(self, key: str, windows: Sequence[Window], n: int = 1) -> Hit:
        if not key or not windows:
            return _UNCOUNTED
        octets = key_octets(key)
        return await self._call(lambda txn, now: records.hit(txn, now, octets, windows, n))

    async def hold(self, key: str, limit: int) -> Lease | None:
        if not key:
            return _FreeLease()
        octets = key_octets(key)
        owners = self._owners
        taken = await self._call(
            lambda txn, now: records.hold(txn, owners.own, octets, limit, owners.alive),
            finish=lambda taken: self._count_own(octets, taken),
            undo=lambda taken: self._give_back(octets) if taken else None,
        )
        return _CountedLease(self._give_back, octets) if taken else None

    async def get(self, key: str) -> bytes | None:
        octets = key_octets(key)
        return await self._call(lambda txn, now: records.get(txn, now, octets))

    async def put(self, key: str, value: bytes, ttl: float) -> None:
        if len(value) > MAX_VALUE:
            raise ValueError(f"a value of {len(value)} octets for {key!r}; the store takes {MAX_VALUE}")
        octets = key_octets(key)
        await self._call(lambda txn, now: records.put(txn, now, octets, value, ttl))

    async def entries(self, prefix: str, limit: int = 1000) -> list[Entry]:
        octets = key_octets(prefix)
        return await self._call(lambda txn, now: records.entries(txn, now, octets, limit))

    async def clear(self, key: str) -> bool:
        octets = key_octets(key)
        return await self._call(lambda txn, now: records.clear(txn, now, octets))

    # -- leases --------------------------------------------------------------------------------------------------

    def _count_own(self, key: bytes, taken: bool) -> None:
        if taken:
            self._held[key] = self._held.get(key, 0) + 1

    def _give_back(self, key: bytes) -> None:
        """Give a place back with the next transaction."""
        if self._held[key] > 1:
            self._held[key] -= 1
        else:
            del self._held[key]
        if self._is_open:  # else the end of this process gives back all
            self._released.append(key)
            if self._pump_timer is None:
                with suppress(RuntimeError):  # the loop is closed
                    self._pump_timer = self._loop.call_soon(self._pump)

    # -- calls ---------------------------------------------------------------------------------------------------

    async def _call(
        self,
        operation: _Operation[T],
        *,
        finish: Callable[[T], None] | None = None,
        undo: Callable[[T], None] | None = None,
    ) -> T:
        """Do it now or as soon as the lock is free; `finish` follows at once, `undo` if the caller has gone then."""
        if not self._is_open:
            raise self._error("closed")
        if not self._waiting and self._try_lock():
            try:
                result = self._transact(operation)
            finally:
                self._lock.give()
            if finish is not None:
                finish(result)
            return result
        future: asyncio.Future[T] = self._loop.create_future()
        waiting = _Waiting(operation, finish, future, self._loop.time() + self._timeout)
        self._waiting.append(waiting)  # type: ignore[arg-type]  # each answers its own future only
        if self._pump_timer is None:
            self._pause = _FIRST_PAUSE
            self._pump_timer = self._loop.call_later(self._pause, self._pump)
        try:
            return await future
        except asyncio.CancelledError:
            if undo is not None and future.done() and not future.cancelled() and future.exception() is None:
                undo(future.result())
            raise

    def _try_lock(self) -> bool:
        try:
            return any(self._lock.take() for _ in range(_SPIN))
        except OSError as error:
            raise self._error(error) from error

    def _pump(self) -> None:
        """Do what waits, if the lock is free; else fail what waited too long, and look again after a pause."""
        self._pump_timer = None
        try:
            if not self._try_lock():
                self._fail_waiting(self._loop.time(), _LOCKED)
                self._pause = min(2 * self._pause, _LONGEST_PAUSE)
                self._pump_timer = self._loop.call_later(self._pause, self._pump)
                return
        except StoreError as error:
            self._fail_waiting(float("inf"), error.__cause__)
            return
        try:
            for _ in range(min(len(self._waiting), _AT_ONCE)):
                self._waiting.popleft().answer(self._transact)
            if self._released:
                with suppress(StoreError):  # the next transaction tries again, and says so
                    self._transact(lambda txn, now: None)
        finally:
            self._lock.give()
        if self._waiting:
            self._pause = _FIRST_PAUSE
            self._pump_timer = self._loop.call_soon(self._pump)

    def _fail_waiting(self, now: float, why: object) -> None:
        """Fail the calls whose time is over by `now`."""
        while self._waiting and self._waiting[0].deadline <= now:
            waiting = self._waiting.popleft()
            if not waiting.future.done():
                waiting.future.set_exception(self._error(why))

    # -- with the lock held --------------------------------------------------------------------------------------

    def _transact(self, operation: _Operation[T]) -> T:
        """One transaction, in the current database, with room for it. Raises StoreError."""
        try:
            if self._control.epoch != self._epoch:
                self._reopen()
            try:
                return self._once(operation)
            except lmdb.MapFullError:
                self._make_room(_EVICTIONS)
            except lmdb.MapResizedError:
                self._reopen()
            except _DAMAGE as error:
                self._renew(str(error))
            try:
                return self._once(operation)
            except _DAMAGE as error:  # the copy was made of what was damaged already
                self._renew(str(error), empty=True)
            return self._once(operation)
        except (lmdb.Error, OSError) as error:
            raise self._error(error) from error

    def _once(self, operation: _Operation[T]) -> T:
        txn = self._env.begin(write=True)
        try:
            for key in self._released:
                records.release(txn, self._owners.own, key)
            result = operation(txn, self._clock())
            txn.commit()
        except BaseException:
            txn.abort()
            raise
        self._released.clear()
        entries, pages = self._usage()
        if pages > self._ceiling and (entries > self._entries or pages > self._pages):
            self._make_room(1 + min(4 * max(0, pages - self._pages), _EVICTIONS))
            entries, pages = self._usage()
        self._entries, self._pages = entries, pages
        return result

    def _usage(self) -> tuple[int, int]:
        """Entries, and pages in use."""
        stat = self._env.stat()
        return stat["entries"], stat["leaf_pages"] + stat["branch_pages"] + stat["overflow_pages"]

    def _make_room(self, times: int) -> None:
        """Forget what would expire soonest; a little at a time, since forgetting needs some room itself."""
        with suppress(lmdb.MapFullError):
            for _ in range(times):
                with self._env.begin(write=True) as txn:
                    records.forget_oldest(txn, _EVICTED)
                if self._usage()[1] < self._ceiling:
                    return

    def _open_database(self) -> None:
        self._env = self._folder.open(self._size)
        pages = self._env.info()["map_size"] // PAGE
        self._ceiling = pages - max(_RESERVE, pages // 8)
        self._epoch = self._control.epoch
        with self._env.begin(write=True) as txn:
            records.hold_again(txn, self._owners.own, self._held)
        self._released.clear()

    def _reopen(self) -> None:
        """Go to the database that another process put in place."""
        self._env.close()
        self._open_database()

    def _renew(self, reason: str, *, empty: bool = False) -> None:
        """Go to the last copy, because the database is of another boot or damaged, and have all others follow.

        With `empty` the copy is damaged as well, and given up.
        """
        if self._epoch >= 0:
            self._env.close()
        self._control.next_epoch()  # first: who is killed between these lines leaves nobody with the old file
        is_new = not self._folder.live.exists()
        if empty:
            self._folder.copy.unlink(missing_ok=True)
        contents, error = self._folder.restore()
        if contents == "copy" or not is_new:
            log.warning("store_restored", store=str(self._path), reason=reason, contents=contents, error=error or None)
        try:
            self._open_database()
        except _DAMAGE as damage:
            if empty:
                raise
            self._renew(str(damage), empty=True)

    # -- twice a second ------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        self._tick_timer = self._loop.call_later(COPY_SECONDS, self._tick)
        with suppress(StoreError):  # sessions meet it too, and say so
            if not self._waiting and self._try_lock():
                try:
                    self._transact(lambda txn, now: records.purge(txn, now, _PURGED))
                finally:
                    self._lock.give()
        if self._copy is None or self._copy.done():
            self._start_copy()

    def _start_copy(self) -> None:
        self._copy = self._loop.run_in_executor(self._thread, self._make_copy)
        self._copy.add_done_callback(self._copied)

    def _copied(self, copy: asyncio.Future[None]) -> None:
        error = None if copy.cancelled() else copy.exception()
        if error is not None and not self._copy_failed:
            log.warning("store_not_copied", store=str(self._path), error=str(error))
        self._copy_failed = error is not None

    def _make_copy(self) -> None:
        """In a thread: copy the database to disk, unless that was done lately or another process does it."""
        if not (self._copying.take() if self._is_open else self._copying.take_within(self._timeout)):
            return
        try:
            begun = time.monotonic()
            if begun - self._control.copied_at < COPY_SECONDS / 2 and self._is_open:
                return
            if not self._copier_lock.take_within(self._timeout):
                raise TimeoutError(_LOCKED)
            try:
                info = self._env.info()
                epoch, transaction = self._control.epoch, info["last_txnid"]
                if epoch != self._epoch or transaction == self._control.copied:
                    return
                unfinished = self._folder.begin_copy((info["last_pgno"] + 1) * PAGE)
            finally:
                self._copier_lock.give()
            self._folder.finish_copy(unfinished)
            if epoch == self._control.epoch:
                self._control.note_copy(transaction, begun)
        finally:
            self._copying.give()

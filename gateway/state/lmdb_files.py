"""The files of the LMDB store: locks, the live database, its copy, and who uses it.

    lock       every transaction holds it (flock); the kernel takes it back from a process that dies
    control    mapped by all: number of the live database, what was copied when
    live.mdb   the database of this boot, never synced: a process that dies harms nothing, a host crash may tear it
    boot       boot id that `live.mdb` belongs to
    copy       the last complete copy of it, on disk, with a checksum; a new boot begins with it
    copying    held by the process that makes a copy
    users      held shared by all, so that the first to come knows that it is alone
    owners/    a file for each process that may hold places, locked while it lives

Everything here blocks for a moment only: locks are tried, never waited for.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final, cast

import lmdb
from lmdb import verify as _verifier

PAGE: Final = mmap.PAGESIZE
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
CHECK_SECONDS: Final = 0.2  # how long it is believed that an owner lives

_TRAILER: Final = struct.Struct("<8sQQ")  # magic, octets before it, their CRC-32
_MAGIC: Final = b"gw-copy1"
_CHUNK: Final = 1 << 20
_problems: Final = cast(Callable[[str, bool], list[str]], _verifier.verify)


def _private(path: Path) -> BinaryIO:
    """A new file for this user alone."""
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb")


class FileLock:
    """An flock on a file of its own, which is made if it is missing. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def take(self, *, shared: bool = False) -> bool:
        """Take it if it is free."""
        try:
            fcntl.flock(self._fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def take_within(self, seconds: float) -> bool:
        """Take it as soon as it is free. For threads: it sleeps."""
        deadline = time.monotonic() + seconds
        while not self.take():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    def give(self) -> None:
        """Give it back."""
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """Give it back for good."""
        os.close(self._fd)


class Control:
    """A few numbers that all processes see at once; they change under `lock` or `copying` only."""

    def __init__(self, path: Path) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, PAGE)
            self._map = mmap.mmap(fd, PAGE)
        finally:
            os.close(fd)
        self._numbers = memoryview(self._map).cast("Q")

    @property
    def epoch(self) -> int:
        """Which live database is the current one: it changes when `live.mdb` is another file."""
        return self._numbers[0]

    def next_epoch(self) -> None:
        """Say that `live.mdb` is about to be another file, of which there is no copy yet."""
        self._numbers[1] = self._numbers[2] = 0
        self._numbers[0] = (self._numbers[0] + 1) % 2**64

    @property
    def copied(self) -> int:
        """The last transaction that the copy has."""
        return self._numbers[1]

    @property
    def copied_at(self) -> float:
        """When the last copy was begun (`time.monotonic`)."""
        return self._numbers[2] / 1000

    def note_copy(self, transaction: int, begun: float) -> None:
        """Say what the copy has."""
        self._numbers[1] = transaction
        self._numbers[2] = int(begun * 1000)

    def close(self) -> None:
        """Unmap it."""
        self._numbers.release()
        self._map.close()


class Owners:
    """Which processes live. An owner is 8 random octets; a file of that name is locked as long as its process lives."""

    def __init__(self, folder: Path, name: str) -> None:
        """Become one; `name` is written into the file for whoever reads it. Raises OSError."""
        folder.mkdir(mode=0o700, exist_ok=True)
        self._folder = folder
        self.own = secrets.token_bytes(8)
        self._path = folder / self.own.hex()
        self._lock = FileLock(self._path)
        self._lock.take()
        self._path.write_text(f"{os.getpid()} {name}\n")
        self._living: dict[bytes, float] = {}

    def alive(self, owner: bytes) -> bool:
        """Whether an owner's process lives; found out again after `CHECK_SECONDS`. The lock must be held."""
        if owner == self.own:
            return True
        now = time.monotonic()
        if now - self._living.get(owner, -CHECK_SECONDS) < CHECK_SECONDS:
            return True
        path = self._folder / owner.hex()
        if path.exists() and not self._ended(path):
            self._living[owner] = now
            return True
        self._living.pop(owner, None)
        return False

    def forget_dead(self) -> int:
        """Remove the files of processes that are gone; how many there were. The lock must be held."""
        return sum([self._ended(path) for path in self._folder.iterdir() if path != self._path])

    @staticmethod
    def _ended(path: Path) -> bool:
        lock = FileLock(path)
        try:
            if not lock.take():
                return False
            path.unlink()
        finally:
            lock.close()
        return True

    def close(self) -> None:
        """Be gone."""
        self._path.unlink(missing_ok=True)
        self._lock.close()


class Folder:
    """The store's folder: made 0700 if it is missing. Raises OSError."""

    def __init__(self, path: Path) -> None:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.stat().st_mode & 0o022:
            raise PermissionError("the folder is writable by others")
        self.path = path
        self.live = path / "live.mdb"
        self.copy = path / "copy"
        self._boot = path / "boot"

    def of_this_boot(self) -> bool:
        """Whether the live database was made since the host came up."""
        try:
            return self._boot.read_bytes() == BOOT_ID.read_bytes() and self.live.exists()
        except FileNotFoundError:
            BOOT_ID.stat()  # where the kernel's own is not to be seen, nothing can be known
            return False

    def damage(self) -> str:
        """What is wrong with the live database, "" if nothing is. Reads all of it."""
        try:
            return "; ".join(_problems(str(self.live), False)[:3])
        except (_verifier.VerifyError, ValueError, struct.error, IndexError) as error:
            return str(error) or type(error).__name__

    def open(self, size: int) -> lmdb.Environment:
        """Open the live database or make an empty one, at least `size` octets. Raises lmdb.Error and OSError.

        It never gets smaller, because others may have it mapped. Its blocks are allocated at once: a full disk would
        otherwise end a process that writes into the map.
        """
        size = -(-size // PAGE) * PAGE
        if self.live.exists():
            size = max(size, self.live.stat().st_size)
        env = lmdb.open(
            str(self.live), map_size=size, subdir=False, mode=0o600, readahead=False,
            lock=False, writemap=True, sync=False, metasync=False,
        )  # fmt: skip
        try:
            with open(self.live, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError:
            env.close()
            raise
        return env

    def restore(self) -> tuple[str, str]:
        """Replace the live database by its copy, else by none: "copy" or "empty", and what is wrong with the copy."""
        fresh = self.path / "live.new"
        fresh.unlink(missing_ok=True)
        is_there, error = self._unpack(fresh)
        if is_there:
            os.replace(fresh, self.live)
        else:
            fresh.unlink(missing_ok=True)
            self.live.unlink(missing_ok=True)
        marked = self.path / "boot.new"
        with _private(marked) as file:
            file.write(BOOT_ID.read_bytes())
        os.replace(marked, self._boot)
        return "copy" if is_there else "empty", error

    def _unpack(self, target: Path) -> tuple[bool, str]:
        try:
            octets = self.copy.read_bytes()
        except FileNotFoundError:
            return False, ""
        data = memoryview(octets)[: -_TRAILER.size]
        if len(octets) < _TRAILER.size or octets[-_TRAILER.size :] != _TRAILER.pack(
            _MAGIC, len(data), zlib.crc32(data)
        ):
            return False, "the copy is damaged"
        with _private(target) as file:
            file.write(data)
        return True, ""

    def begin_copy(self, size: int) -> Path:
        """Copy the first `size` octets of the live database; the lock must be held. For threads: it is slow."""
        unfinished = self.path / "copy.new"
        unfinished.unlink(missing_ok=True)
        with (
            open(self.live, "rb") as source,
            _private(unfinished) as target,
        ):
            done = 0
            while done < size:
                sent = os.sendfile(target.fileno(), source.fileno(), done, size - done)
                if not sent:
                    raise OSError(f"live.mdb ends at {done} of {size} octets")
                done += sent
        return unfinished

    def finish_copy(self, unfinished: Path) -> None:
        """Make what `begin_copy` wrote the copy, on disk. The lock need not be held."""
        with open(unfinished, "r+b") as file:
            length, checksum = 0, 0
            while chunk := file.read(_CHUNK):
                length += len(chunk)
                checksum = zlib.crc32(chunk, checksum)
            file.write(_TRAILER.pack(_MAGIC, length, checksum))
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, self.copy)
        folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

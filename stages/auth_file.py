"""Verify users against a file of `user:hash` lines, as htpasswd, doveadm and `gateway hash-password` make them.

Asked in auth, for PLAIN, LOGIN and, if switched on and the file has {PLAIN} entries, CRAM-MD5 and APOP. A verify
costs 50 to 500 ms of CPU by design, so it runs in a few threads of the stage; when too many wait, the answer is 454.
Unknown users cost as much as known ones. The file is looked at before each verify and read again when it has changed; a
new one that cannot be read or has a bad line is logged, and the last good one stays in use.

Forms: bcrypt ($2b$, $2y$), argon2 ($argon2id$), sha512-crypt ($6$), sha256-crypt ($5$), md5-crypt ($1$), apr1
($apr1$), {SSHA}, {SSHA256}, {SSHA512}, {SHA} and {PLAIN}; Dovecot's {SCHEME} in front is understood. Fields behind
the hash are ignored. Empty lines and lines that begin with # too. Users are compared without regard to case.

    stages:
      - auth_file: users/demo
      - auth_file: {file: users/staff, cache: 30s, fallthrough: true}
"""

from __future__ import annotations

import os
from asyncio import AbstractEventLoop
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from secrets import token_bytes
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from gateway import (
    Attempt,
    Authenticated,
    Cause,
    Digest,
    Duration,
    ExistingFile,
    Kind,
    Password,
    Refuse,
    Session,
    Settings,
    Stage,
    Worker,
)
from gateway.passwords import PLAIN, StoredPassword, parse_stored, verify_password
from gateway.protocol import sasl

if TYPE_CHECKING:
    import structlog

CACHED = 10_000  # successes remembered at most

def _parse(text: str) -> dict[str, StoredPassword]:
    """User (lower case) to entry. Raises ValueError with the number of the line; it never quotes a hash."""
    entries: dict[str, StoredPassword] = {}
    for number, line in enumerate(text.split("\n"), 1):
        line = line.rstrip("\r")
        if not line.strip() or line.startswith("#"):
            continue
        user, colon, stored = line.partition(":")
        user = user.strip().lower()
        if not colon or not user:
            raise ValueError(f"line {number}: not user:hash")
        if user in entries:
            raise ValueError(f"line {number}: a second entry for {user!r}")
        entry = parse_stored(stored)
        if entry is None:
            raise ValueError(f"line {number}: the hash of {user!r} has no known form; write gateway hash-password's")
        entries[user] = entry
    return entries


class _Users:
    """The file's entries, its stamp when read, and a stand-in hash for users that it does not have."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stamp = _stamp(path)
        self.entries: Mapping[str, StoredPassword] = _parse(path.read_text("utf-8", "surrogateescape"))
        self.in_clear = any(entry.verifier == PLAIN for entry in self.entries.values())
        self.stand_in = _most_common(self.entries)


def _stamp(path: Path) -> tuple[int, int, int]:
    found = os.stat(path)
    return found.st_mtime_ns, found.st_size, found.st_ino


def _most_common(entries: Mapping[str, StoredPassword]) -> StoredPassword:
    """A hash of the form that most users have: verifying it takes as long as theirs."""
    forms = Counter(entry.verifier for entry in entries.values())
    usual = forms.most_common(1)[0][0] if forms else PLAIN
    return next((entry for entry in entries.values() if entry.verifier == usual), StoredPassword(PLAIN, "*"))


class AuthFileSettings(Settings):
    """The file and how it is used."""

    short_form: ClassVar[str | None] = "file"

    file: ExistingFile = Field(description="File of `user:hash` lines; relative to the pipeline file.")
    required: bool = Field(True, description="MAIL before AUTH is 530.")
    cram_md5: bool = Field(False, description="Offer CRAM-MD5, for users whose entry is {PLAIN}.")
    apop: bool = Field(False, description="Offer POP3's APOP, for users whose entry is {PLAIN}.")
    fallthrough: bool = Field(False, description="Leave users that the file does not have to the next auth stage.")
    cache: Duration = Field(0.0, le=60, description="How long a right password is remembered, at most 60s; 0: not.")
    threads: int = Field(2, ge=1, le=16, description="Verifies at a time.")
    queue: int = Field(50, ge=0, description="Verifies that may wait for a thread; more are answered 454.")


class AuthFile(Stage):
    """Verify users against a file of `user:hash` lines."""

    Settings = AuthFileSettings
    kind = Kind.GUARD
    decides_identity = True
    never_pass = True
    timeout = 15.0
    settings: AuthFileSettings
    _loop: AbstractEventLoop
    _clock: Callable[[], float]
    _log: structlog.typing.FilteringBoundLogger

    def __init__(self, settings: AuthFileSettings) -> None:
        super().__init__(settings)
        self.required = settings.required
        self._users: _Users | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._pending = 0
        self._unreadable: tuple[int, int, int] | None = None
        self._cache: dict[bytes, tuple[float, str]] = {}  # until when, whose
        self._key = token_bytes(32)

    async def start(self, worker: Worker) -> None:
        """Read the file and load the verifiers. Raises OSError or ValueError for a file that cannot be used."""
        self._loop, self._clock, self._log = worker.loop, worker.clock, worker.log
        self._threads = ThreadPoolExecutor(self.settings.threads, thread_name_prefix=self.id)
        try:
            self._users = await self._loop.run_in_executor(self._threads, _Users, self.settings.file)
        except ValueError as error:
            raise ValueError(f"{self.settings.file}: {error}") from None
        # The first verify also loads its library: not at the expense of the first client.
        await self._loop.run_in_executor(self._threads, verify_password, self._users.stand_in, "")

    async def stop(self) -> None:
        """End the threads; nobody waits for a verify any more."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def mechanisms(self, session: Session) -> Sequence[str]:
        """PLAIN, LOGIN, and CRAM-MD5 and APOP where they can be verified."""
        names = ["PLAIN", "LOGIN"]
        if self._users is not None and self._users.in_clear:
            if self.settings.cram_md5:
                names.append("CRAM-MD5")
            if self.settings.apop and session.protocol == "pop3":
                names.append("APOP")
        return tuple(names)

    async def auth(self, session: Session, attempt: Attempt) -> Refuse | Authenticated | None:
        """Verify a password or a CRAM-MD5 digest."""
        given = attempt.credentials
        if not isinstance(given, (Password, Digest)):
            return None
        users = await self._current()
        entry = users.entries.get(given.user.lower())
        if entry is None and self.settings.fallthrough:
            return None
        if isinstance(given, Digest):
            known = entry is not None and entry.verifier == PLAIN
            key = entry.hash if entry is not None and known else "*"
            if not (_digest_fits(key, given) and known):
                return Refuse(Cause.AUTH_FAILED)
            return Authenticated(given.user, password=key)
        if given.authzid.lower() not in ("", given.user.lower()):
            return Refuse(Cause.AUTH_FAILED, log=f"{self.id}: no user may act for another")
        right = await self._right(entry or users.stand_in, given.user, given.password)
        if right is None:
            return Refuse(Cause.AUTH_UNAVAILABLE, temporary=True, log=f"{self.id}: too many verifies wait for a thread")
        if entry is None or not right:
            return Refuse(Cause.AUTH_FAILED)
        return Authenticated(given.user, password=given.password)

    async def _current(self) -> _Users:
        """The file as it is now, or as it last was good."""
        assert self._users is not None
        try:
            stamp = _stamp(self.settings.file)
        except OSError:
            stamp = (0, 0, 0)
        if stamp in (self._users.stamp, self._unreadable):
            return self._users
        try:
            self._users = await self._loop.run_in_executor(self._threads, _Users, self.settings.file)
            self._cache.clear()
        except (OSError, ValueError) as error:
            self._unreadable = stamp  # said once, and not read again until it changes
            self._log.error("users_file", stage=self.id, file=str(self.settings.file), error=str(error),
                            action="the last good one stays in use")  # fmt: skip
        return self._users

    async def _right(self, entry: StoredPassword, user: str, password: str) -> bool | None:
        """Whether the password fits the entry; None if too many wait for an answer."""
        key, now = b"", self._clock()
        if self.settings.cache:
            key = self._cache_key(entry, user, password)
            if key in self._cache and self._cache[key][0] > now:
                return True
        if self._pending >= self.settings.threads + self.settings.queue:
            return None
        self._pending += 1
        try:
            right = await self._loop.run_in_executor(self._threads, verify_password, entry, password)
        finally:
            self._pending -= 1
        if right and key:
            if len(self._cache) >= CACHED:
                self._cache.clear()
            self._cache[key] = now + self.settings.cache, user.lower()
        return right

    def clear_cache(self, user: str) -> int:
        """Forget right passwords of `user` (of all if empty); how many."""
        keys = [key for key, (_, whose) in self._cache.items() if user.lower() in ("", whose)]
        for key in keys:
            del self._cache[key]
        return len(keys)

    def _cache_key(self, entry: StoredPassword, user: str, password: str) -> bytes:
        """An HMAC over everything that the verify sees, so that a changed hash or user is another key."""
        mac = blake2b(key=self._key, digest_size=32)
        for text in (user.lower(), password, entry.hash):
            data = text.encode("utf-8", "surrogateescape")
            mac.update(len(data).to_bytes(8, "big") + data)
        return mac.digest()


def _digest_fits(key: str, given: Digest) -> bool:
    """CRAM-MD5 (RFC 2195): the keyed MD5 of our challenge; APOP (RFC 1939 7): the plain one of both."""
    verify = sasl.verify_apop if given.mechanism == "APOP" else sasl.verify_cram_md5
    return verify(key, given.challenge, given.digest)

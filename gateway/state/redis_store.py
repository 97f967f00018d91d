"""The store of several hosts: Redis, by one server, a master that sentinels name, or a cluster (see `redis_url.py`).

Nothing beyond the commands of Redis 6.2 is used, so Redis 6.2, 7 and 8 serve as well as Valkey 7.2 and 8. A check is
one round trip, by a script that runs in the server (`redis_scripts.py`), and the calls of a worker share one
connection without waiting for each other (`redis_line.py`). The server's clock counts, not that of the gateways.

Keys in Redis are `<prefix>rate:<key>`, `<prefix>held:<key>` and `<prefix>value:<key>`. All have an expiry: rates as
long as their hits count, values as long as asked, and places held as long as a lease. The worker renews its leases
all the time; when it is gone they end by themselves.

Where Redis does not answer, or refuses because it is full, still loading, or no longer the master, calls raise
StoreError. The store then tries by itself to get it back.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Sequence
from functools import lru_cache
from itertools import count
from operator import attrgetter
from typing import Final

import structlog
from redis.exceptions import NoScriptError, RedisError

from gateway.state.redis_line import Reply, Words, failure, no_answer
from gateway.state.redis_scripts import BY_SHA, HIT, HOLD, PLACES, RATES, RENEW
from gateway.state.redis_servers import Servers, servers_at
from gateway.state.redis_url import parse_url
from gateway.state.settings import StoreSettings
from gateway.state.store import MAX_VALUE, Entry, Hit, ImmediateStore, Lease, StoreError, Window

log = structlog.get_logger("gateway.store")

_UNCOUNTED = Hit(True, 0.0, ())

LONGEST: Final = 10 * 365 * 86_400.0
"""Seconds for which a value is kept at most; Redis cannot count to infinity."""

_LEASES_A_CALL = 100  # as many are renewed by one call: other clients wait for it, about 0.1 ms
_KEYS_A_SCAN = b"1000"


@lru_cache(maxsize=1024)
def _window_words(windows: tuple[Window, ...]) -> Words:
    """Limit and period of each window as the script takes them; 60 and 60.0 are the same period."""
    words = []
    for limit, period in windows:
        if not period > 0:
            raise ValueError(f"a window's period is {period!r}, not a positive number of seconds")
        words += [str(limit), str(int(period)) if period == int(period) else repr(float(period))]
    return tuple([word.encode() for word in words])


def _glob(text: str) -> str:
    """A pattern of SCAN that means `text` itself."""
    return "".join(["\\" + char if char in "*?[]^\\" else char for char in text])


class _FreeLease:
    """The lease of an empty key: nothing is counted."""

    __slots__ = ()

    def release(self) -> None:
        return


class _HeldLease:
    __slots__ = ("_id", "_store")

    def __init__(self, store: RedisStore, lease_id: bytes) -> None:
        self._store = store
        self._id = lease_id

    def release(self) -> None:
        self._store._release(self._id)


_FREE = _FreeLease()


class RedisStore:
    """A `Store` in Redis.

    `owner` tells workers apart where somebody looks into Redis. Leases are renewed every `heartbeat` seconds, and
    end `lease` seconds after the worker that held them was last heard of. `verify` is whether the certificate of a
    server with TLS must be valid and bear its name. Raises ValueError if the settings' URL is none.
    """

    def __init__(
        self, settings: StoreSettings, *, owner: str, verify: bool = True, heartbeat: float = 2.0, lease: float = 6.0
    ) -> None:
        place = parse_url(settings.url, password=settings.password, ca_file=settings.ca_file, verify=verify)
        self._servers: Servers = servers_at(place, settings.timeout)
        self._timeout = settings.timeout
        self._rate, self._places, self._value = (
            f"{settings.prefix}{kind}:".encode() for kind in ("rate", "held", "value")
        )
        self._prefix = settings.prefix
        self._owner = f"{owner}:{secrets.token_hex(6)}:"  # unique, since process ids repeat on other hosts
        self._numbers = count()
        self._held: dict[bytes, bytes] = {}  # the key of each lease
        self._heartbeat = heartbeat
        self._lease_time = repr(float(lease)).encode()
        self._renewer: asyncio.Task[None] | None = None

    @property
    def immediate(self) -> ImmediateStore | None:
        return None

    @property
    def name(self) -> str:
        """The server as error texts name it."""
        return self._servers.name

    async def open(self) -> None:
        """Connect. A server that cannot be reached now is only warned of: the store goes on trying."""
        try:
            await self._servers.open()
        except StoreError as error:
            log.warning("store_unreachable", store="redis", error=str(error))

    async def hit(self, key: str, windows: Sequence[Window], n: int = 1) -> Hit:
        if not key or not windows:
            return _UNCOUNTED
        redis_key = self._rate + key.encode("utf-8", "surrogateescape")
        reply = await self._ask(redis_key, HIT.call(redis_key, b"%d" % n, *_window_words(tuple(windows))))
        if not isinstance(reply, bytes):
            raise StoreError(f"{self.name}: unexpected reply")
        allowed, wait, *counts = reply.split()
        return Hit(allowed == b"1", float(wait), tuple([float(number) for number in counts]))

    async def hold(self, key: str, limit: int) -> Lease | None:
        if not key:
            return _FREE
        redis_key = self._places + key.encode("utf-8", "surrogateescape")
        lease_id = f"{self._owner}{next(self._numbers)}".encode()
        try:
            reply = await self._ask(redis_key, HOLD.call(redis_key, b"%d" % limit, lease_id, self._lease_time))
        except asyncio.CancelledError:  # it may yet be taken, for nobody
            self._servers.tell(redis_key, (b"ZREM", redis_key, lease_id))
            raise
        if reply != 1:
            return None
        self._held[lease_id] = redis_key
        if self._renewer is None:
            self._renewer = asyncio.create_task(self._renew_always(), name="leases in redis")
        return _HeldLease(self, lease_id)

    async def get(self, key: str) -> bytes | None:
        redis_key = self._value + key.encode("utf-8", "surrogateescape")
        reply = await self._ask(redis_key, (b"GET", redis_key))
        return reply if isinstance(reply, bytes) else None

    async def put(self, key: str, value: bytes, ttl: float) -> None:
        if len(value) > MAX_VALUE:
            raise ValueError(f"a value of {len(value)} octets for {key!r}; the store takes {MAX_VALUE}")
        redis_key = self._value + key.encode("utf-8", "surrogateescape")
        if ttl <= 0:
            await self._ask(redis_key, (b"UNLINK", redis_key))
            return
        milliseconds = math.ceil(min(ttl, LONGEST) * 1000)
        await self._ask(redis_key, (b"SET", redis_key, value, b"PX", b"%d" % milliseconds))

    async def entries(self, prefix: str, limit: int = 1000) -> list[Entry]:
        """As `Store.entries`, but of more than `limit` entries any may be given: Redis has no order of keys.

        Looks through all keys of the database in small steps; raises StoreError if that takes longer than the
        time-out.
        """
        try:
            async with asyncio.timeout(self._timeout):
                keys = await self._keys(prefix, limit)
                parts = await asyncio.gather(*[self._entries_of(kind, key) for kind, key in keys])
        except TimeoutError:
            raise StoreError(f"{self.name}: too many keys to look through in {self._timeout:g} s", "timeout") from None
        return sorted([entry for part in parts for entry in part], key=attrgetter("key"))[:limit]

    async def clear(self, key: str) -> bool:
        name = key.encode("utf-8", "surrogateescape")
        keys = (self._rate + name, self._value + name)
        replies = await asyncio.gather(*[self._ask(redis_key, (b"UNLINK", redis_key)) for redis_key in keys])
        return any(replies)

    async def close(self) -> None:
        renewer, self._renewer = self._renewer, None
        if renewer is not None:
            renewer.cancel()
            await asyncio.wait([renewer])
        held, self._held = self._held, {}
        if held:
            calls = [self._ask(key, (b"ZREM", key, lease_id)) for lease_id, key in held.items()]
            await asyncio.gather(*calls, return_exceptions=True)  # what is not released ends by itself
        await self._servers.close()

    async def _ask(self, key: bytes, words: Words) -> Reply:
        """One round trip about `key`, a second one if the server does not know the script. Raises StoreError."""
        deadline = asyncio.get_running_loop().time() + self._timeout
        try:
            try:
                return await self._servers.ask(key, words, deadline)
            except NoScriptError:
                return await self._servers.ask(key, BY_SHA[words[1]].in_full(words), deadline)
        except RedisError as error:
            raise failure(error).error(self.name) from None
        except TimeoutError:
            raise no_answer(self._timeout).error(self.name) from None

    def _release(self, lease_id: bytes) -> None:
        key = self._held.pop(lease_id, None)
        if key is not None:
            self._servers.tell(key, (b"ZREM", key, lease_id))

    async def _renew_always(self) -> None:
        """Renew the leases every heartbeat, and each second while the store is away, to find them in time."""
        renewed = True
        while True:
            await asyncio.sleep(self._heartbeat if renewed else min(1.0, self._heartbeat))
            renewed = await self._renew()

    async def _renew(self) -> bool:
        """Renew every lease of this worker; whether all were."""
        leases: dict[bytes, list[bytes]] = {}
        for lease_id, key in self._held.items():
            leases.setdefault(key, []).append(lease_id)
        for group in self._servers.together(list(leases)):
            pairs = [(key, lease_id) for key in group for lease_id in leases[key]]
            for start in range(0, len(pairs), _LEASES_A_CALL):
                # What was released since must not come back.
                batch = [pair for pair in pairs[start : start + _LEASES_A_CALL] if pair[1] in self._held]
                if not batch:
                    continue
                keys, ids = zip(*batch, strict=True)
                try:
                    await self._ask(keys[0], RENEW.call_each(keys, (self._lease_time, *ids)))
                except StoreError:
                    return False
        return True

    async def _keys(self, prefix: str, limit: int) -> set[tuple[str, str]]:
        """Kind and key of entries whose keys begin with `prefix`: `limit` of them, or all if there are fewer."""
        pattern = f"{_glob(self._prefix)}*:{_glob(prefix)}*".encode("utf-8", "surrogateescape")
        found: set[tuple[str, str]] = set()
        deadline = asyncio.get_running_loop().time() + self._timeout
        for line in await self._servers.masters():
            cursor = b"0"
            while len(found) < limit:
                try:
                    reply = await line.ask((b"SCAN", cursor, b"MATCH", pattern, b"COUNT", _KEYS_A_SCAN), deadline)
                except RedisError as error:
                    raise failure(error).error(self.name) from None
                match reply:
                    case [bytes(cursor), list(keys)]:
                        for key in keys:
                            if isinstance(key, bytes):
                                text = key.decode("utf-8", "surrogateescape")[len(self._prefix) :]
                                kind, _, name = text.partition(":")
                                if kind in ("rate", "held", "value") and name.startswith(prefix):
                                    found.add((kind, name))
                if cursor == b"0":
                    break
        return found

    async def _entries_of(self, kind: str, key: str) -> list[Entry]:
        """What is left of one key now; nothing if it is gone meanwhile."""
        name = key.encode("utf-8", "surrogateescape")
        if kind == "rate":
            rates = await self._ask(self._rate + name, RATES.call(self._rate + name))
            pairs = [rate.split() for rate in rates if isinstance(rate, bytes)] if isinstance(rates, list) else []
            return [Entry(key, "rate", float(estimate), None, float(rest)) for estimate, rest in pairs]
        if kind == "held":
            taken = await self._ask(self._places + name, PLACES.call(self._places + name, self._lease_time))
            return [Entry(key, "held", taken, None, None)] if isinstance(taken, int) and taken else []
        redis_key = self._value + name
        questions = [self._ask(redis_key, (command, redis_key)) for command in (b"GET", b"PTTL")]
        value, rest = await asyncio.gather(*questions)
        if not isinstance(value, bytes) or not isinstance(rest, int) or rest < 0:
            return []
        return [Entry(key, "value", 0, value, rest / 1000)]

"""A pool: which of its servers the next connection goes to, and which are left alone for a while.

Selection never opens a connection; the prelude and the probe report how opening one went (`failed`,
`succeeded`, `probed`). What the servers announced is merged into the pool's profile in `profile.py`.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal

from gateway.upstream.dial import tls_context
from gateway.upstream.profile import ProfileStore, parse_keywords, shared_keywords
from gateway.upstream.server import Server, parse_server

if TYPE_CHECKING:
    from gateway.protocol.smtp import Ehlo
    from gateway.session import Session

Balance = Literal["round_robin", "least_connections", "client", "user", "domain"]
TlsPolicy = Literal["off", "opportunistic", "required"]

FIRST_BACK_OFF = 1.0
LONGEST_BACK_OFF = 60.0
REST_SECONDS = 1.0
SMALLEST_SHARE = 0.1
DYNAMIC_POOLS = 1024


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """A pool as configured. Times are seconds.

    `servers` are URLs and weights. `balance`: in turn by weight, fewest connections for its weight, or the same
    server for the same client address, user or domain. `max_connections` holds per server, `queue` for sessions
    that wait for one. `source` is the local address to connect from. `assume` replaces what the servers announce
    (`("SIZE 10000000", "8BITMIME")`); stores are then not asked. `greeting_timeout` covers each of TLS, greeting and
    EHLO. Without `health` servers are not asked at the start nor watched. `health_fall` failures of the active check in
    a row take a server out, `health_rise` successes bring it back; what comes back has its full share after
    `slow_start`. `allow_plaintext_login` lets passwords pass in clear text over the network.
    """

    servers: tuple[tuple[str, int], ...] = ()
    balance: Balance = "round_robin"
    max_connections: int = 80
    queue: int = 100
    queue_timeout: float = 10.0
    tls: TlsPolicy = "opportunistic"
    verify: bool = True
    ca_file: str | None = None
    server_name: str | None = None
    source: str | None = None
    bdat: bool = False
    reuse: bool = False
    reuse_transactions: int = 20
    reuse_idle: float = 30.0
    assume: tuple[str, ...] | None = None
    connect_timeout: float = 10.0
    greeting_timeout: float = 30.0
    command_timeout: float = 300.0
    data_done_timeout: float = 600.0  # RFC 5321 4.5.3.2.6: clients wait ten minutes for the end of data
    allow_plaintext_login: bool = False
    hello: Literal["ehlo", "as_client"] = "ehlo"
    health: bool = True
    health_interval: float = 30.0
    health_timeout: float = 5.0
    health_fall: int = 3
    health_rise: int = 2
    slow_start: float = 30.0


class PoolUnavailable(Exception):
    """No server can be given; the text says why."""


class PoolDown(PoolUnavailable):
    """Every server is down, ejected or was tried already."""


class PoolBusy(PoolUnavailable):
    """Every server has all the connections it may have, and waiting did not help."""


@dataclass(slots=True, eq=False)
class _Waiter:
    future: asyncio.Future[Server]
    session: Session
    exclude: Collection[Server]


class Pool:
    """A named group of servers.

    `clock` is seconds that only grow, `store` remembers what servers announced. `learner` (the health check's) asks
    them now. Raises ValueError for settings that cannot work.
    """

    def __init__(
        self,
        name: str,
        settings: PoolSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        store: ProfileStore | None = None,
    ) -> None:
        if not settings.servers:
            raise ValueError(f"pool {name}: no servers")
        self.name = name
        self.settings = settings
        self.servers = [Server(url, weight) for url, weight in settings.servers]
        self.protocol = self.servers[0].protocol
        if any(server.protocol != self.protocol for server in self.servers):
            raise ValueError(f"pool {name}: its servers speak different protocols")
        for server in self.servers:
            verified = settings.verify and (server.implicit_tls or settings.tls == "required")
            if verified and server.target.path and settings.server_name is None:
                raise ValueError(f"{server.url}: a socket has no name to verify; write server_name or verify: false")
        if settings.ca_file is not None:
            tls_context(settings.ca_file, True)  # so that a file that is none is found now
        self._clock = clock
        self._store = store
        self._waiters: deque[_Waiter] = deque()
        self._turn = 0
        self.learner: Callable[[], Awaitable[None]] | None = None
        self._assumed = None if settings.assume is None else parse_keywords(settings.assume)
        self._profile: dict[str, str] | None = None
        self._merge()

    # --- selection

    async def acquire(self, session: Session, exclude: Collection[Server] = ()) -> Server:
        """A server for one more connection; give it back with `release`.

        `exclude` are servers this session tried already. Waits in line while all are full. Raises PoolDown (at
        once) and PoolBusy (line too long, or waited `queue_timeout`).
        """
        if not any(server.available(self._clock()) for server in self.servers if server not in exclude):
            raise PoolDown(self._why_down(exclude))
        if self._waiters:
            self._serve_waiters()
        if not self._waiters or exclude:
            server = self._choose(session, exclude)
            if server is not None:
                server.active += 1
                return server
        if len(self._waiters) >= self.settings.queue:
            raise PoolBusy(f"pool {self.name}: every server has {self.settings.max_connections} connections "
                           f"and {len(self._waiters)} sessions wait already")
        return await self._wait(session, exclude)

    async def _wait(self, session: Session, exclude: Collection[Server]) -> Server:
        loop = asyncio.get_running_loop()
        waiter = _Waiter(loop.create_future(), session, exclude)
        self._waiters.append(waiter)
        timer = loop.call_later(self.settings.queue_timeout, self._waited_too_long, waiter)
        try:
            return await waiter.future
        except asyncio.CancelledError:
            # The session was ended in the very turn in which it got its server.
            if waiter.future.done() and not waiter.future.cancelled() and waiter.future.exception() is None:
                self.release(waiter.future.result())
            raise
        finally:
            timer.cancel()
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def _waited_too_long(self, waiter: _Waiter) -> None:
        if not waiter.future.done():
            waiter.future.set_exception(PoolBusy(
                f"pool {self.name}: no connection became free within {self.settings.queue_timeout:g}s"))

    def release(self, server: Server) -> None:
        """A connection from `acquire` is over (or idle); the first in line that can use the place gets it."""
        server.active -= 1
        if self._waiters:
            self._serve_waiters()

    def _serve_waiters(self) -> None:
        for waiter in list(self._waiters):
            if waiter.future.done():
                self._waiters.remove(waiter)
                continue
            server = self._choose(waiter.session, waiter.exclude)
            if server is None:
                if not waiter.exclude:
                    return
                continue
            server.active += 1
            self._waiters.remove(waiter)
            waiter.future.set_result(server)

    def _choose(self, session: Session, exclude: Collection[Server]) -> Server | None:
        """The server the balance names among those that may take one more, or None."""
        now = self._clock()
        limit = self.settings.max_connections
        free = [s for s in self.servers if s.active < limit and s.available(now) and s not in exclude]
        if len(free) <= 1:
            return free[0] if free else None
        match self.settings.balance:
            case "round_robin":
                return self._next_in_turn(free, now)
            case "least_connections":
                self._turn += 1
                chosen = min(free, key=lambda s: ((s.active + 1) / self._share(s, now), s.turn))
                chosen.turn = self._turn
                return chosen
            case _:
                key = self._hash_key(session)
                return max(free, key=lambda s: _rendezvous(key, s) * self._share(s, now))

    def _next_in_turn(self, free: list[Server], now: float) -> Server:
        """Weighted round robin without bursts: each gains its share, the richest pays the total and is taken."""
        total = 0.0
        chosen = free[0]
        for server in free:
            share = self._share(server, now)
            total += share
            server.share += share
            if server.share > chosen.share:
                chosen = server
        chosen.share -= total
        return chosen

    def _share(self, server: Server, now: float) -> float:
        """The weight, less for a while after an ejection: a server just back has cold caches (slow return)."""
        since, whole = now - server.ejected_until, self.settings.slow_start
        return server.weight if since >= whole else server.weight * max(SMALLEST_SHARE, since / whole)

    def _hash_key(self, session: Session) -> bytes:
        """What stays with one server. Without a user (or sender domain) the client's address stands in."""
        key = ""
        if self.settings.balance == "user":
            key = session.user
        elif self.settings.balance == "domain":
            key = session.user.rpartition("@")[2] if "@" in session.user else ""
            if not key and session.transaction is not None:
                key = session.transaction.sender_domain
        return (key or session.client.address).encode()

    # --- health

    def failed(self, server: Server, error: str, *, slow: bool = False) -> None:
        """Connect, TLS, greeting or EHLO failed.

        Ejects the server, longer with each failure in a row, but never more than half of the pool: beyond that it
        rests a second if finding out took long (`slow`), so that not every session waits for the same silence.
        """
        now = self._clock()
        server.last_error = error
        if server.ejected_until > now:
            return  # sessions that began before the ejection tell nothing new
        server.failures += 1
        if 2 * sum(not other.available(now) for other in self.servers if other is not server) + 2 <= len(self.servers):
            server.ejected_until = now + min(FIRST_BACK_OFF * 2.0 ** min(server.failures - 1, 10), LONGEST_BACK_OFF)
        elif slow:
            server.resting_until = now + REST_SECONDS
        self._dismiss_waiters(now)

    def succeeded(self, server: Server) -> None:
        """The server answered connect, TLS, greeting and EHLO."""
        if server.failures:
            server.failures = 0
            server.last_error = ""
            server.ejected_until = min(server.ejected_until, self._clock())
            server.resting_until = float("-inf")
            self._serve_waiters()

    def probed(self, server: Server, error: str) -> None:
        """The health check's word (empty: healthy); unlike sessions it may take the last server out."""
        now = self._clock()
        if error:
            server.down = True
            server.last_error = error
            self._dismiss_waiters(now)
        elif server.down:
            server.down = False
            server.ejected_until = now  # it returns slowly
            server.failures = 0
            server.last_error = ""
            self._serve_waiters()
        else:
            self.succeeded(server)

    def _dismiss_waiters(self, now: float) -> None:
        """Nobody waits for a pool that is down."""
        if not self._waiters or any(server.available(now) for server in self.servers):
            return
        for waiter in self._waiters:
            if not waiter.future.done():
                waiter.future.set_exception(PoolDown(self._why_down(())))

    def _why_down(self, exclude: Collection[Server]) -> str:
        rest = [f"{s.url}: {s.last_error or 'down'}" for s in self.servers if s not in exclude]
        return f"pool {self.name}: " + ("; ".join(rest) or "every server was tried")

    # --- what the servers announce

    def learned(self, server: Server, ehlo: Ehlo) -> None:
        """The server's EHLO or capabilities in the gateway's own state: after TLS, before it speaks for a client."""
        if self._assumed is not None or (server.ehlo is not None and server.ehlo.keywords == ehlo.keywords):
            return
        server.ehlo = ehlo
        if self._store is not None:
            self._store.put(server.url, ehlo.keywords)
        self._merge()

    def profile(self) -> dict[str, str] | None:
        """What every server of the pool announces, or what is assumed of them; None while nothing is known."""
        return None if self._profile is None else dict(self._profile)

    async def learn(self) -> bool:
        """Ask the servers now what they announce, if nothing is known yet; whether something is known then."""
        if self._profile is None and self.learner is not None:
            await self.learner()
        return self._profile is not None

    def _merge(self) -> None:
        self._profile = self._assumed if self._assumed is not None else shared_keywords(list(self._known()))

    def _known(self) -> Iterable[Mapping[str, str]]:
        for server in self.servers:
            keywords = None
            if server.ehlo is not None:
                keywords = server.ehlo.keywords
            elif self._store is not None:
                keywords = self._store.get(server.url)
            if keywords is not None:
                yield keywords

    def close_idle(self) -> None:
        """End the connections kept for reuse (at a stop)."""
        for server in self.servers:
            while server.idle:
                connection = server.idle.pop()
                connection.stop_waiting()
                connection.end_quietly()

    def __repr__(self) -> str:
        return f"<Pool {self.name} {len(self.servers)} servers>"


def _rendezvous(key: bytes, server: Server) -> float:
    """Highest random weight: each key ranks the servers its own way, so a lost server moves only its own keys.

    Times the weight, it gives each server its share of the keys.
    """
    digest = blake2b(key, digest_size=8, key=server.key).digest()
    return -1.0 / math.log(((int.from_bytes(digest) >> 12) + 0.5) / 2**52)


class Pools(dict[str, Pool]):
    """The pools of a pipeline by name, and pools of one for servers that an auth server names."""

    def __init__(
        self,
        pools: Mapping[str, Pool],
        *,
        dynamic: PoolSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(pools)
        self._dynamic: OrderedDict[tuple[str, str], Pool] = OrderedDict()
        self._settings = dynamic or PoolSettings()
        self._clock = clock

    def server(self, url: str, protocol: str = "smtp") -> Pool:
        """The pool of one for this server, made at first use; a bare address is that of a server of `protocol`.

        A server that a named pool lists too gets that pool's settings, so that naming it does not lose the TLS
        asked for. Raises ValueError for a URL that is none.
        """
        key = (url, protocol)
        pool = self._dynamic.get(key)
        if pool is not None:
            self._dynamic.move_to_end(key)
            return pool
        target = parse_server(url, protocol)
        settings, address = self._settings, str(target)
        for known in self.values():
            for server in known.servers:
                if server.url == address or (server.target.same_place(target) and "://" not in url):
                    settings, address = known.settings, server.url
        pool = Pool(address, replace(settings, servers=((address, 1),)), clock=self._clock)
        self._dynamic[key] = pool
        if len(self._dynamic) > DYNAMIC_POOLS:
            self._forget_one()
        return pool

    def _forget_one(self) -> None:
        """Drop the one not asked for longest that nothing uses; sessions keep theirs anyway."""
        for key, pool in self._dynamic.items():
            if all(server.active == 0 for server in pool.servers):
                pool.close_idle()
                del self._dynamic[key]
                return

    def close_idle(self) -> None:
        """End the connections kept for reuse in every pool."""
        for pool in (*self.values(), *self._dynamic.values()):
            pool.close_idle()
